"""Attention as rectangles and triangles of the score matrix, each an ordinary flash call, merged by log-sum-exp.

Parts that see the same keys at different distances turn queries and keys differently before the call. They are
disjoint: nothing is counted twice and taken off again, as in A + B - C (Jet-Long and others, 2607.07740), which cancels
where B is close to C and computes a window twice. The work is that of plain causal attention but for the edges of
blocks. One backward pass for the whole: each piece's share, from the merged output and log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import flash, sinking
from .merge import merge
from .rerotation import RotaryPlanes

ALL, CAUSAL, TURNED = "all", "causal", "turned"
BLOCK = 128  # queries of a triangle: a kernel computes the whole square
WIDE = 768  # queries of a rectangle: from here on the CPU's kernel takes 256 of them at a time
Shift = Callable[[Tensor], Tensor] | None  # position -> by how much its states are turned; None leaves them


@dataclass(frozen=True)
class Piece:
    """A part of the score matrix.

    Attributes:
        queries: positions, from and to.
        keys: likewise.
        sees: ``all``; ``causal``, the n-th query the first n keys; ``turned``, the n-th query all but the first n - 1.
        query_turn: which of the step's turns of queries.
        key_turn: which of the step's turns of keys.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    sees: str = ALL
    query_turn: int = 0
    key_turn: int = 0


@dataclass(frozen=True)
class Step:
    """Pieces of consecutive queries.

    Attributes:
        queries: positions, from and to; pieces lie within.
        pieces: disjoint.
        query_turns: what pieces refer to.
        key_turns: likewise.
    """

    queries: tuple[int, int]
    pieces: tuple[Piece, ...]
    query_turns: tuple[Shift, ...] = (None,)
    key_turns: tuple[Shift, ...] = (None,)


def whole(queries: tuple[int, int], first: int = 0) -> Iterator[Piece]:
    """Yield plain causal attention to the keys from ``first`` on."""
    if queries[0] > first:
        yield Piece(queries, (first, queries[0]))
    yield Piece(queries, queries, CAUSAL)


def near(queries: tuple[int, int], width: int, turns: tuple[int, int] = (0, 0)) -> Iterator[Piece]:
    """Yield the keys at a distance below ``width``; the first query has as many before it."""
    for i, end in _blocks(queries, min(BLOCK, width)):
        n = end - i
        yield Piece((i, end), (i, end), CAUSAL, *turns)
        if width > n:
            yield Piece((i, end), (end - width, i), ALL, *turns)
        if n > 1:
            yield Piece((i, end - 1), (i - width + 1, end - width), TURNED, *turns)


def far(queries: tuple[int, int], width: int, turns: tuple[int, int]) -> Iterator[Piece]:
    """Yield the keys at a distance of ``width`` or more; the first query has as many before it."""
    for start, stop in _blocks(queries, WIDE):
        yield Piece((start, stop), (0, start - width + 1), ALL, *turns)
        for i, end in _blocks((start, stop), min(BLOCK, width)):
            if i > start:
                yield Piece((i, end), (start - width + 1, i - width + 1), ALL, *turns)
            if end - i > 1:
                yield Piece((i + 1, end), (i - width + 1, end - width), CAUSAL, *turns)


def _blocks(queries: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    for i in range(*queries, size):
        yield i, min(i + size, queries[1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    steps: Sequence[Step],
    turning: RotaryPlanes,
    scale: float,
    gap: tuple[int, int] = (0, 0),
    sinks: Tensor | None = None,
) -> Tensor:
    """Run steps, which cover consecutive queries; in linear memory, where no gradient is needed.

    Args:
        query: (batch, heads, q, d), turned for their positions; the first is the first of the first step.
        key: (batch, kv heads, k, d), likewise, from position 0 on.
        value: (batch, kv heads, k, d_v), d_v at most d.
        steps: what to compute.
        turning: how states turn.
        scale: on the inner products.
        gap: keys that are missing, from and to; no piece asks for them.
        sinks: a score for each head that takes its share of the weights, (heads,); None for none.

    Returns:
        (batch, heads, q, d_v).
    """
    origin, width, outs = steps[0].queries[0], value.shape[-1], []
    padded = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    for step in steps:
        mine = query[:, :, step.queries[0] - origin : step.queries[1] - origin]
        queries = [_turned(mine, step.queries[0], turn, turning) for turn in step.query_turns]
        keys = [_turned(key[:, :, : _reach(step, n)], 0, turn, turning) for n, turn in enumerate(step.key_turns)]
        states = (sinks, padded, len(queries), *queries, *keys)
        out: Tensor = _Merged.apply(step, scale, gap, *states)  # type: ignore[no-untyped-call]
        outs.append(out[..., :width])
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def scores(
    query: Tensor,
    key: Tensor,
    steps: Sequence[Step],
    turning: RotaryPlanes,
    scale: float,
    gap: tuple[int, int] = (0, 0),
) -> Tensor:
    """Write the scores out, (batch, heads, q, k), -inf for what is not seen: the dense way, and what kernels keep.

    The arguments are those of :func:`attend`.
    """
    origin, groups = steps[0].queries[0], query.shape[1] // key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    found = query.new_full((*query.shape[:3], key.shape[2]), -torch.inf, dtype=exact)
    for step in steps:
        mine = query[:, :, step.queries[0] - origin : step.queries[1] - origin]
        queries = [_turned(mine, step.queries[0], turn, turning) for turn in step.query_turns]
        keys = [_turned(key[:, :, : _reach(step, n)], 0, t, turning) for n, t in enumerate(step.key_turns)]
        for piece in step.pieces:
            rows, columns = slice(piece.queries[0] - origin, piece.queries[1] - origin), _columns(piece, gap)
            left = queries[piece.query_turn][:, :, piece.queries[0] - step.queries[0] :][:, :, : rows.stop - rows.start]
            right = keys[piece.key_turn][:, :, columns].repeat_interleave(groups, 1)
            part = scale * left.to(exact) @ right.to(exact).transpose(-1, -2)
            n = torch.arange(part.shape[-2], device=query.device)
            if piece.sees != ALL:
                hidden = n < n[:, None] if piece.sees == TURNED else n > n[:, None]
                part = torch.where(hidden, found[:, :, rows, columns], part)
            found[:, :, rows, columns] = part
    return found


def _reach(step: Step, turn: int) -> int:
    return max((piece.keys[1] for piece in step.pieces if piece.key_turn == turn), default=0)


def _turned(states: Tensor, first: int, turn: Shift, turning: RotaryPlanes) -> Tensor:
    if turn is None:
        return states
    places = torch.arange(first, first + states.shape[2], device=states.device)
    return turning.turn(states, turning.table(turn(places), states.dtype))


class _Merged(torch.autograd.Function):
    """Pieces of one step."""

    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
        scale: float,
        gap: tuple[int, int],
        sinks: Tensor | None,
        value: Tensor,
        count: int,
        *states: Tensor,
    ) -> Tensor:
        """``states`` are ``count`` turns of the queries, then those of the keys."""
        shape, exact = states[0].shape, torch.promote_types(value.dtype, torch.float32)
        out = torch.zeros(shape, dtype=exact, device=value.device)
        total = torch.full(shape[:3], -torch.inf, dtype=exact, device=value.device)
        for piece in step.pieces:
            rows, query, key, values = _parts(step, piece, gap, states[:count], states[count:], value)
            found, log = flash.forward(query, key, values, piece.sees != ALL, scale)
            if piece.sees == TURNED:
                found, log = found.flip(2), log.flip(2)
            here = (slice(None), slice(None), rows)
            out[here], total[here] = merge((out[here], total[here]), (found, log))
        if sinks is not None:
            total, share = sinking.total_with(total, sinks)
            out = out * share[..., None]
        merged = out.to(value.dtype)
        ctx.save_for_backward(sinks, value, merged, total, *states)
        ctx.step, ctx.scale, ctx.gap, ctx.count = step, scale, gap, count
        return merged

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Each piece's share."""
        sinks, value, out, total, *states = ctx.saved_tensors
        count, step = ctx.count, ctx.step
        exact = torch.promote_types(value.dtype, torch.float32)
        grads = [torch.zeros_like(t, dtype=exact) for t in (value, *states)]
        for piece in step.pieces:
            rows, query, key, values = _parts(step, piece, ctx.gap, states[:count], states[count:], value)
            mine, merged, log = (t[:, :, rows] for t in (grad, out, total))
            if piece.sees == TURNED:
                mine, merged, log = (t.flip(2).contiguous() for t in (mine, merged, log))
            shares = flash.backward(mine, query, key, values, merged, log, piece.sees != ALL, ctx.scale)
            places = (_columns(piece, ctx.gap), rows)
            for found, into, place in zip(
                shares,
                (grads[1 + piece.query_turn], grads[1 + count + piece.key_turn], grads[0]),
                (places[1], places[0], places[0]),
                strict=True,
            ):
                into[:, :, place] += found.flip(2) if piece.sees == TURNED else found
        wanted = [g.to(value.dtype) for g in grads]
        of_sinks = None if sinks is None else sinking.gradient(grad, out, total, sinks)
        return None, None, None, of_sinks, wanted[0], None, *wanted[1:]


def _parts(
    step: Step, piece: Piece, gap: tuple[int, int], queries: Sequence[Tensor], keys: Sequence[Tensor], value: Tensor
) -> tuple[slice, Tensor, Tensor, Tensor]:
    """Return which rows these are, and their queries, keys and values."""
    first = step.queries[0]
    rows, columns = slice(piece.queries[0] - first, piece.queries[1] - first), _columns(piece, gap)
    found = (queries[piece.query_turn][:, :, rows], keys[piece.key_turn][:, :, columns], value[:, :, columns])
    query, key, value = (t.flip(2) for t in found) if piece.sees == TURNED else found
    return rows, query, key, value


def _columns(piece: Piece, gap: tuple[int, int]) -> slice:
    away = gap[1] - gap[0] if piece.keys[0] >= gap[1] else 0
    return slice(piece.keys[0] - away, piece.keys[1] - away)
