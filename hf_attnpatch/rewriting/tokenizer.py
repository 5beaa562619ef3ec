"""Raises the truncation length of a tokenizer when the model's context grows."""

from __future__ import annotations

from typing import Any

_OFFSETS = 8  # rows of a table that stand for no position: RoBERTa declares 514 for 512 tokens


def lengthened(tokenizer: Any, *contexts: int) -> str | None:
    """Raise the length at which a tokenizer truncates, if it equals a former context of the model.

    Args:
        tokenizer: of transformers; changed in place.
        contexts: that the model's config declared, in tokens, one after the other; the last is what it declares now.

    Returns:
        A sentence on what was changed; None where the tokenizer had a length of its own, or none.
    """
    old = getattr(tokenizer, "model_max_length", None)
    if not isinstance(old, int):
        return None
    before = next((n for n in contexts[:-1] if n - _OFFSETS <= old <= n < contexts[-1]), None)
    if before is None:
        return None
    tokenizer.model_max_length = old + contexts[-1] - before
    return f"tokenizer: model_max_length {old} -> {tokenizer.model_max_length}"
