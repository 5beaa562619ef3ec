"""Greedy decoding with a cache, on rows of one length, without padding or generation settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..upstream import words
from ..upstream.caches import length, returned
from ..upstream.roles import roles_of, unwrapped
from .announcing import announced
from .logits import last_logits


def prefill(model: nn.Module, ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
    """Read tokens into the cache.

    Args:
        model: a causal language model in eval mode.
        ids: tokens that follow what is cached, shape (batch, tokens), int64.
        past: the cache of what precedes them, or None.

    Returns:
        The logits after the last token, shape (batch, vocabulary), and the cache.

    Raises:
        EvaluationError: the model returns no cache, or logits that are not finite.
    """
    given = {words.USE_CACHE: True, **({} if past is None else {words.CACHE: past})}
    logits, output = last_logits(model, ids, roles_of(unwrapped(model)).call(**given))
    cache = next(iter(returned(output).values()), None)
    if cache is None:
        raise EvaluationError(
            f"{type(model).__name__} returned no cache although it was asked for one, and decoding needs a cache; "
            "measure it by what needs none: perplexity, loss_by_position, fidelity with continuation=0."
        )
    bad = (~torch.isfinite(logits[:, -1]).all(dim=-1)).nonzero()
    if len(bad):
        raise EvaluationError(
            f"row {int(bad[0])} of a batch of {len(ids)}: logits that are not finite after {length(cache)} tokens."
        )
    return logits[:, -1], cache


def greedy(
    model: nn.Module,
    ids: Tensor,
    new_tokens: int,
    *,
    past: Any = None,
    done: Callable[[Tensor], bool] | None = None,
    every: int = 8,
) -> Tensor:
    """Continue each row with its most likely tokens; a model scaled per request is told the final length.

    Args:
        model: a causal language model in eval mode.
        ids: tokens that follow what is cached, shape (batch, tokens), int64.
        new_tokens: tokens to add, at most.
        past: the cache of what precedes them, or None; it is used up.
        done: is shown what has been added so far, (batch, added), now and then, and says whether that is enough.
        every: tokens between two such questions.

    Returns:
        The added tokens, shape (batch, new_tokens or fewer), int64.
    """
    with announced(model, ids.shape[1] + new_tokens, past):
        logits, past = prefill(model, ids, past)
        added = [logits.argmax(dim=-1, keepdim=True)]
        while len(added) < new_tokens:
            if done is not None and len(added) % every == 0 and done(torch.cat(added, dim=1)):
                break
            logits, past = prefill(model, added[-1], past)
            added.append(logits.argmax(dim=-1, keepdim=True))
    return torch.cat(added, dim=1)
