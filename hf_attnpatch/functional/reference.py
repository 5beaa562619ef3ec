"""Attention as in the formula, in fp64, with every score in memory: the reference for all kernels."""

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


def rotated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance: Tensor,
    frequencies: Tensor,
    *,
    scale: float,
    mask: Tensor,
    interleaved: bool = False,
    first: int = 0,
) -> Tensor:
    """Return attention of unrotated states, each pair rotated by its own distance times each frequency.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d_v).
        distance: (q, k), any real numbers.
        frequencies: (planes,), radians per position.
        scale: on the inner products.
        mask: (q, k), bool, True where a query sees a key.
        interleaved: whether a plane is two neighbouring dimensions rather than two that are ``planes`` apart.
        first: the first rotated dimension.

    Returns:
        (batch, heads, q, d_v), fp64.
    """
    planes, groups = len(frequencies), query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    queries, last = query.double(), first + 2 * planes

    def plane(states: Tensor) -> Tensor:
        mine = states[..., first:last]
        parts = (mine[..., ::2], mine[..., 1::2]) if interleaved else mine.chunk(2, -1)
        return torch.complex(*parts)

    angles = distance.double()[..., None] * frequencies.double()
    turn = torch.polar(torch.ones_like(angles), angles)
    scores = torch.einsum("bhqp,bhkp,qkp->bhqk", plane(queries), plane(keys).conj(), turn).real
    for left, right in ((queries[..., :first], keys[..., :first]), (queries[..., last:], keys[..., last:])):
        scores = scores + left @ right.transpose(-1, -2)
    return (scale * scores).masked_fill(~mask, -torch.inf).softmax(-1) @ values


def causal(queries: int, keys: int) -> Tensor:
    """The causal mask, (queries, keys), bool: the last query sees every key."""
    here = torch.arange(queries)[:, None] + keys - queries
    return torch.arange(keys) <= here
