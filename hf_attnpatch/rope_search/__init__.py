"""LongRoPE's divisors, searched for on text: an evolution, its course, its state on disk."""
