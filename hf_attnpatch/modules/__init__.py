"""Modules and hooks that stay inside a patched model: shared heads, added positions, angles that stand still."""
