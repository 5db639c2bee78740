"""Recipes: engines that are not ours, run so that a prediction about them can be recorded and checked."""
