"""Scaling rotary frequencies: natively, for each request, and searched on one's own text."""
