"""Recipes: one file per source; a recipe is a function that returns the full configuration of a run."""
