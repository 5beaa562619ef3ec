"""Attention as the formula has it, in fp64, every score in memory: what everything faster is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v, over the keys that the mask lets through.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d_v).
        scale: on the inner products.
        bias: added to the scores, broadcast to (batch, heads, q, k).
        mask: bool, True where a query sees a key, broadcast likewise.

    Returns:
        Output (batch, heads, q, d_v) and attention rows (batch, heads, q, k), both fp64.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = scale * query.double() @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    rows = scores.softmax(-1)
    return rows @ values, rows


def causal(queries: int, keys: int) -> Tensor:
    """The causal mask, (queries, keys), bool: the last query sees every key."""
    here = torch.arange(queries)[:, None] + keys - queries
    return torch.arange(keys) <= here
