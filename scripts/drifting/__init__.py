"""Copies of transformers with one consistent change each, and what the patches make of them."""
