"""Scaling of rotary frequencies: as transformers does it, and with a factor for each request."""
