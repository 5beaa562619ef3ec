"""Attention with learned sinks through flash kernels: each head has one more score, of a key whose value is nothing.

With a sink, the output is that of plain attention times sigmoid(lse - sink), where lse is the log of the sum of the
exponentiated scores, which flash kernels know. Their own backward pass, given the scaled output and the log-sum-exp
with the sink in it, returns the gradients of queries, keys and values, exactly: it computes weights from that sum. The
sink's own score has the weight exp(sink - total), and its value is zero, so that its gradient is minus that weight
times the inner product of the output and the gradient of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import flash

HIDDEN = -1e30  # score of a key that a query does not see; finite, so that a row of padding is no nan


@dataclass(frozen=True)
class Tile:
    """Some consecutive queries and the keys that they look at.

    Attributes:
        rows: from and to.
        columns: from and to.
        seen: (batch or 1, heads or 1, rows or 1, columns): bool, or float that is added; None if all are seen.
        causal: query i of the tile sees the keys of the tile up to i, beside what ``seen`` says.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    seen: Tensor | None = None
    causal: bool = False


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    tiles: Sequence[Tile],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attend, in memory that is linear beside the tiles' own masks; with dropout, every score is in memory.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d_v), d_v at most d.
        sinks: scores of the sinks, (heads,), or (batch or 1, heads, q or 1, 1).
        tiles: cover all queries, in order.
        scale: on the inner products of queries and keys; the sinks are not scaled.
        dropout: probability of dropping an attention weight; torch's kernel has none on a CPU.

    Returns:
        (batch, heads, q, d_v); zeros for a query that sees no key.
    """
    width = value.shape[-1]
    if dropout > 0:
        parts = []
        for tile in tiles:
            rows, columns = slice(*tile.rows), slice(*tile.columns)
            states = (query[:, :, rows], key[:, :, columns], value[:, :, columns])
            own = sinks[:, :, rows] if sinks.dim() == 4 and sinks.shape[2] > 1 else sinks
            parts.append(_written_out(*states, own, tile.seen, tile.causal, scale, dropout))
        return torch.cat(parts, 2)
    padded = F.pad(value, (0, query.shape[-1] - width)) if width != query.shape[-1] else value
    out: Tensor = _Sunk.apply(tuple(tiles), scale, query, key, padded, by_row(sinks))  # type: ignore[no-untyped-call]
    return out[..., :width]


def bands(length: int, window: int, device: torch.device, rows: int = 256) -> list[Tile]:
    """Return the tiles of a causal window over rows without padding.

    Args:
        length: tokens.
        window: last tokens that a query sees, itself among them.
        device: of the masks.
        rows: queries of a tile.
    """
    found = []
    for start in range(0, length, rows):
        stop, low = min(start + rows, length), max(0, start - window + 1)
        gap = torch.arange(start, stop, device=device)[:, None] - torch.arange(low, stop, device=device)
        found.append(Tile((start, stop), (low, stop), ((gap >= 0) & (gap < window))[None, None]))
    return found


def logs(query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], scale: float) -> Tensor:
    """Return the log-sum-exp of each query's scores, (batch, heads, q); the arguments are those of :func:`attend`."""
    padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return torch.cat([_part(query, key, padded, tile, scale)[1] for tile in tiles], 2)


def _part(query: Tensor, key: Tensor, value: Tensor, tile: Tile, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from the queries of a tile, without sinks: output and log-sum-exp."""
    rows, columns = slice(*tile.rows), slice(*tile.columns)
    states = (query[:, :, rows], key[:, :, columns], value[:, :, columns])
    return flash.forward(*states, tile.causal, scale, _added(tile.seen, query))


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Torch's ``scaled_dot_product_attention``, with sinks if there are any.

    The arguments are those of :func:`attend`; ``mask`` is (batch or 1, heads or 1, q or 1, k), bool or added. Where
    gradients of the mask or dropout of the weights are wanted beside sinks, every score is in memory.
    """
    if sinks is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if mask is not None and mask.requires_grad:
        return _written_out(query, key, value, sinks, mask, causal, scale, dropout)
    tile = Tile((0, query.shape[2]), (0, key.shape[2]), mask, causal)
    return attend(query, key, value, sinks, [tile], scale, dropout)


def total_with(log: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Put sinks into a log-sum-exp.

    Args:
        log: of attention without them, (batch, heads, q).
        sinks: as in :func:`attend`.

    Returns:
        The log-sum-exp with them, and the share of the weights that keys keep, both like ``log``.
    """
    total = torch.logaddexp(log, by_row(sinks).to(log))
    return total, (log - total).exp()


def gradient(grad: Tensor, out: Tensor, total: Tensor, sinks: Tensor) -> Tensor:
    """Return the gradient of the sinks.

    Args:
        grad: of the output, (batch, heads, q, d_v).
        out: the output, with the sinks' share taken off.
        total: log-sum-exp with the sinks in it, (batch, heads, q).
        sinks: as in :func:`attend`.
    """
    rows = by_row(sinks)
    weight = (rows.to(total) - total).exp()
    each = -weight * (grad.to(total) * out.to(total)).sum(-1)
    return each.sum_to_size(rows.shape).to(sinks.dtype).view(sinks.shape)


def by_row(sinks: Tensor) -> Tensor:
    """Return the sinks for every row: (heads,) or (batch or 1, heads, q or 1, 1) -> (batch or 1, heads, q or 1)."""
    return sinks[None, :, None] if sinks.dim() == 1 else sinks.squeeze(-1) if sinks.dim() == 4 else sinks


class _Sunk(torch.autograd.Function):
    """Tiles of one attention module."""

    @staticmethod
    def forward(
        ctx: Any, tiles: tuple[Tile, ...], scale: float, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor
    ) -> Tensor:
        """Each tile by a flash call, then the sinks' share off the whole."""
        parts = zip(*(_part(query, key, value, tile, scale) for tile in tiles), strict=True)
        whole, log = (each[0] if len(tiles) == 1 else torch.cat(each, 2) for each in parts)
        total, share = total_with(log, sinks)
        found = (whole.to(share) * share[..., None]).to(value.dtype)
        ctx.save_for_backward(query, key, value, sinks, found, total)
        ctx.tiles, ctx.scale = tiles, scale
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The kernel's own backward for each tile, from the output and the log-sum-exp of the whole."""
        query, key, value, sinks, out, total = ctx.saved_tensors
        exact = torch.promote_types(value.dtype, torch.float32)
        of_query = []
        of_key, of_value = (torch.zeros_like(t, dtype=exact) for t in (key, value))
        for tile in ctx.tiles:
            rows, columns = slice(*tile.rows), slice(*tile.columns)
            states = (query[:, :, rows], key[:, :, columns], value[:, :, columns])
            mine = (t[:, :, rows].contiguous() for t in (grad, out, total))
            given, merged, log = mine
            shares = flash.backward(given, *states, merged, log, tile.causal, ctx.scale, _added(tile.seen, query))
            of_query.append(shares[0])
            of_key[:, :, columns] += shares[1]
            of_value[:, :, columns] += shares[2]
        first = of_query[0] if len(of_query) == 1 else torch.cat(of_query, 2)
        wanted = (t.to(value.dtype) for t in (first, of_key, of_value))
        return None, None, *wanted, gradient(grad, out, total, sinks)


def _added(seen: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask that is added, in a dtype that kernels take beside these queries."""
    if seen is None:
        return None
    dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
    low = max(HIDDEN, torch.finfo(dtype).min)
    if seen.dtype == torch.bool:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, low)
    return seen.clamp(min=low).to(dtype)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """Every score in memory, in fp32."""
    exact, groups = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = scale * query.to(exact) @ keys.to(exact).transpose(-1, -2)
    if causal:
        n, m = (torch.arange(size, device=query.device) for size in scores.shape[-2:])
        scores = scores.masked_fill(m > n[:, None], HIDDEN)
    added = _added(mask, scores)
    scores = scores if added is None else scores + added
    more = by_row(sinks).to(scores)[..., None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, more], -1).softmax(-1)[..., :-1].to(value.dtype)
    return F.dropout(weights, dropout) @ values
