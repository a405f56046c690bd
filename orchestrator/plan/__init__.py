"""Plans: a pipeline as frozen steps with content ids."""
