"""Recipes: one script per question, one training loop, and the settings they run with."""
