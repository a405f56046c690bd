"""Where hosts and tasks run: on Ray, or in this process."""
