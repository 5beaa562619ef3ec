"""Scaling rotary frequencies: natively, and for each request."""
