"""Exchanging what a model knows positions by: taking it out, and what comes in its place."""
