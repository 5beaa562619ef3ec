"""Removes a model's positions and adds others: the edits, and the checks that they do what is meant."""
