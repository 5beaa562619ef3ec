"""Searches LongRoPE's divisors on text: an evolutionary search with its state on disk."""
