"""Modules and hooks of patched models: shared heads, added positions, rotations fixed at position 0."""
