"""The memory that generation needs for its cache."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import EvaluationError
from ..upstream import words
from ..upstream.caches import returned
from .logits import forward
from .memory import held_bytes
from .mode import device_of, measuring


def cache_bytes_per_token(model: nn.Module, *, length: int = 16) -> float:
    """Measure how many bytes a model's cache grows with each token.

    Read from the cache itself after two prefills, of ``length`` and of twice as many tokens, never from the config: a
    state that does not grow (a recurrence, a full sliding window) does not count.

    Args:
        model: a causal language model; run in eval mode, put back as it was.
        length: tokens of the shorter prefill.

    Raises:
        EvaluationError: the model returns no cache.
    """
    with measuring(model):
        sizes = [_cache_bytes(model, tokens) for tokens in (length, 2 * length)]
    return (sizes[1] - sizes[0]) / length


def _cache_bytes(model: nn.Module, tokens: int) -> int:
    ids = torch.arange(tokens, device=device_of(model))[None] % 7  # 1, tokens
    found = returned(forward(model, {words.TOKENS: ids, words.USE_CACHE: True}))
    past = next(iter(found.values()), None)
    if past is None:
        raise EvaluationError(f"{type(model).__name__} returned no cache, so there is none to measure.")
    return held_bytes(past)
