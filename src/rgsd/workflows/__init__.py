"""Workflows: whole commands, from a recipe to a run folder."""
