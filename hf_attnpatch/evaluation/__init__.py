"""Measures a model, patched or not: nothing here knows of patches."""

from .cache import cache_bytes_per_token
from .perplexity import Interval, Losses, Score, difference, document_losses, perplexity, summarise

__all__ = [
    "Interval",
    "Losses",
    "Score",
    "cache_bytes_per_token",
    "difference",
    "document_losses",
    "perplexity",
    "summarise",
]
