"""Segment-level recurrence (Transformer-XL, 1901.02860, section 3.2) as arithmetic on token numbers.

A row of tokens is cut into segments. A query sees its own segment up to itself and the last ``memory`` tokens before
the segment, so that a layer's mask is a function of two token numbers. Everything else (a cache, padding, rows at other
places in their documents) only determines the numbers of the queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOBODY = -1  # the number of padding, and of empty places in a memory


@dataclass(frozen=True)
class Segments:
    """How rows are cut into segments.

    Attributes:
        length: of a segment in tokens.
        memory: tokens before its segment that a query sees.
        sinks: first tokens of a row that every query sees, however far back.
    """

    length: int
    memory: int
    sinks: int = 0

    def start(self, number: Tensor) -> Tensor:
        """Return the number of the first token of each token's segment, shape as given."""
        return number.div(self.length, rounding_mode="floor") * self.length

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Return which keys each query sees.

        Args:
            query: token numbers, (batch or 1, q), int64.
            key: token numbers, (batch or 1, k), int64; nobody sees :data:`NOBODY`.

        Returns:
            (batch or 1, q, k), bool.
        """
        return (key[:, None] >= self.oldest(query)[..., None]) & (key[:, None] <= query[..., None])

    def oldest(self, query: Tensor) -> Tensor:
        """Return the number of the first token that each query sees, without sinks; shape as given."""
        return (self.start(query) - self.memory).clamp(min=0)

    def recalled(self, query: Tensor, sink: Tensor) -> Tensor:
        """Return which sinks a query sees only as sinks: (batch or 1, q), (batch or 1, sinks) -> (.., q, sinks)."""
        return (sink != NOBODY)[:, None] & (sink[:, None] < self.oldest(query)[..., None])

    def drawn_near(self, query: Tensor, sink: Tensor) -> Tensor:
        """Return where sinks stand for queries of one segment, whose distance to them stays bounded (2309.17453).

        Right before the oldest token that is seen, in their order: (batch, 1), (batch, sinks) -> (batch, sinks).
        """
        return torch.maximum(sink, self.oldest(query) - self.sinks + sink)

    def mask(self, tokens: int) -> Tensor:
        """Return the mask of a whole text, (tokens, tokens), bool: blocks, each with a window before it."""
        number = torch.arange(tokens)[None]
        seen = self.visible(number, number)[0]
        seen[:, : self.sinks] |= self.recalled(number, number[:, : self.sinks])[0]
        return seen


@dataclass(frozen=True)
class Piece:
    """Adjacent queries of one call that attend together.

    Attributes:
        start: first query, a column of the call.
        stop: one after the last.
        low: first key, a column of memory and call side by side; the last is that of the last query.
    """

    start: int
    stop: int
    low: int


def pieces(segments: Segments, held: int, tokens: int, phase: int | None, borders: tuple[int, ...] = ()) -> list[Piece]:
    """Cut a call into pieces.

    Args:
        segments: how rows are cut.
        held: columns of memory before the call.
        tokens: columns of the call.
        phase: tokens of the present segment that every row has read already; None where rows differ, and then a piece
            may lie across the border of two segments.
        borders: columns at which a piece has to end in any case.
    """
    found, start = [], 0
    while start < tokens:
        inside = 0 if phase is None else (phase + start) % segments.length
        ends = (tokens, start + segments.length - inside, *(b for b in borders if b > start))
        stop = min(ends)
        back = (segments.length - 1 if phase is None else inside) + segments.memory
        found.append(Piece(start, stop, max(0, held + start - back)))
        start = stop
    return found
