"""Recipes: what a person asks for, read from YAML and checked before anything is started."""
