"""Who sees whom, in the form that each attention kernel takes a mask in."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from ..errors import AttnPatchError


def formed(seen: Tensor, name: str, keep: Tensor, like: Tensor) -> Any:
    """Return a mask; None where it is plainly causal and the kernel knows.

    Args:
        seen: (batch or 1, q, k), bool, True is seen.
        name: of the kernel in transformers.
        keep: queries that are no padding, (batch, q), bool.
        like: queries, for device and dtype.

    Raises:
        AttnPatchError: the kernel cannot express it.
    """
    queries, keys = seen.shape[1:]
    if name.startswith("flash"):
        return keys_alone(seen, keep)
    if bool((seen == corner(queries, keys)).all()):
        if queries == 1 or (keys == queries and name == "sdpa"):
            return None
        seen = corner(queries, keys)[None]
    seen = seen.to(like.device)
    if name == "eager":
        return like.new_zeros(()).masked_fill(~seen[:, None], float(torch.finfo(like.dtype).min))
    if name == "flex_attention":
        rows = seen.expand(like.shape[0], -1, -1)
        sizes = (like.shape[0], None, queries, keys)
        return create_block_mask(lambda b, _, q, k: rows[b, q, k], *sizes, device=str(like.device))
    return seen[:, None]


@functools.lru_cache(maxsize=8)
def corner(queries: int, keys: int) -> Tensor:
    """The causal mask where the last query stands at the last key, (queries, keys), bool."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def keys_alone(seen: Tensor, keep: Tensor) -> Tensor | None:
    """The mask as FlashAttention takes it: which keys are there, (batch, k); None if all.

    It aligns the last query with the last key, and leaves padding out of both.

    Raises:
        AttnPatchError: queries of one row see different beginnings, or rows stand differently in their segments.
    """
    there = (seen & keep[..., None]).any(1)
    width = keep.shape[1]
    wanted = there[:, None] & torch.ones(seen.shape[1:], dtype=torch.bool).tril(seen.shape[2] - width)
    if not bool((wanted == seen)[keep].all()):
        raise AttnPatchError(
            "FlashAttention takes which keys there are, not which query sees which: rows that stand differently in "
            "their segments need backend='sdpa' or 'flex_attention' (pad on the right, in calls of whole segments)."
        )
    return None if bool(there.all()) else there
