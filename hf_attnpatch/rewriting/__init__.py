"""Carries over what a command that rewrites a checkpoint must preserve."""
