"""A tokenizer truncates where the model once ended; a longer context raises that, too."""

from __future__ import annotations

from typing import Any

_OFFSETS = 8  # rows of a table that stand for no position: RoBERTa declares 514 for 512 tokens


def lengthened(tokenizer: Any, before: int, after: int) -> str | None:
    """Raise the length at which a tokenizer truncates, where it had the model's old one.

    Args:
        tokenizer: of transformers; changed in place.
        before: context that the model's config declared, in tokens.
        after: context that it declares now.

    Returns:
        A sentence on what was changed; None where the tokenizer had a length of its own, or none.
    """
    old = getattr(tokenizer, "model_max_length", None)
    if not isinstance(old, int) or not before - _OFFSETS <= old <= before or after <= before:
        return None
    tokenizer.model_max_length = old + after - before
    return f"tokenizer: model_max_length {old} -> {tokenizer.model_max_length}"
