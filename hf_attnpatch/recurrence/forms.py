"""The mask of a piece in the form that each attention kernel takes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from ..errors import AttnPatchError


def formed(seen: Tensor, name: str, keep: Tensor, like: Tensor) -> Any:
    """Return a mask in a kernel's form; None if it is plainly causal, which the kernel does by itself.

    Args:
        seen: (batch or 1, q, k), bool, True where a key is seen.
        name: transformers' name of the kernel.
        keep: (batch, q), bool: True for queries that are no padding.
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
    """Return the causal mask in which the last query is at the last key, (queries, keys), bool."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def keys_alone(seen: Tensor, keep: Tensor) -> Tensor | None:
    """Return the mask in FlashAttention's form: which keys are present, (batch, k); None if all are.

    FlashAttention aligns the last query with the last key, and removes padding from both.

    Raises:
        AttnPatchError: queries of one row see different first keys, or rows are at different places in their segments.
    """
    there = (seen & keep[..., None]).any(1)
    width = keep.shape[1]
    wanted = there[:, None] & torch.ones(seen.shape[1:], dtype=torch.bool).tril(seen.shape[2] - width)
    if not bool((wanted == seen)[keep].all()):
        raise AttnPatchError(
            "FlashAttention takes which keys are present, not which query sees which: rows at different places in "
            "their segments need backend='sdpa' or 'flex_attention' (pad on the right, in calls of whole segments)."
        )
    return None if bool(there.all()) else there
