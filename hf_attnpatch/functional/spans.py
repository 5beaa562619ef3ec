"""Position remappings for rotary models: the distance at which a query sees each key, and the flash calls for it.

Each kind gives the distance at which a query at position i sees the key at position j (`distance`, `sees`), and lists
pieces of the score matrix in which that is a rotation of the queries and one of the keys (`steps`). Queries before
`plain` see true distances: inputs within the trained length are computed as before, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .pieces import Piece, Step, far, near, whole


class Remapping(Protocol):
    """How far a query sees each key to be."""

    @property
    def plain(self) -> int:
        """Queries before this position see true distances."""

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the distance at which a query at one position sees the key at another, fp64, broadcast."""

    def sees(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Return which of the keys before it the query sees, broadcast; None for all."""

    def still(self, query: int) -> int:
        """Return how many keys, the query's own and those just before it, it sees at their true distance."""

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the steps for queries from ``first`` to before ``last``, all beyond ``plain``."""


@dataclass(frozen=True)
class Grouped:
    """Self-Extend: beyond ``window``, positions are shared by ``group`` tokens (2401.01325, section 3.2).

    Attributes:
        window: distances below it are as they are.
        group: positions that become one.
        plain: see :class:`Remapping`.
    """

    window: int
    group: int
    plain: int

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """I // G - j // G + w - w // G beyond the window."""
        gap = query - key
        grouped = query // self.group - key // self.group + self.window - self.window // self.group
        return torch.where((gap < self.window) | (query < self.plain), gap, grouped).double()

    def sees(self, query: Tensor, key: Tensor) -> None:
        """Everything."""

    def still(self, query: int) -> int:
        """The window."""
        return self.window

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """A band, and what is before it."""
        shift = self.window - self.window // self.group
        turns = (None, lambda i: i // self.group + shift - i), (None, lambda j: j // self.group - j)
        yield _two_bands((first, last), self.window, *turns)


@dataclass(frozen=True)
class Clipped:
    """ReRoPE: distances beyond ``window`` count as it; leaky, they grow on with slope ``leak`` (Su, 2023).

    Attributes:
        window: distances below it are as they are.
        leak: by how much distance grows with each token beyond it; 0 clips.
        plain: see :class:`Remapping`.
    """

    window: int
    leak: float
    plain: int

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """W + leak (i - j - w) beyond the window."""
        gap = (query - key).double()
        return torch.where(
            (gap < self.window) | (query < self.plain), gap, self.window + self.leak * (gap - self.window)
        )

    def sees(self, query: Tensor, key: Tensor) -> None:
        """Everything."""

    def still(self, query: int) -> int:
        """The window."""
        return self.window

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """A band, and what is before it."""
        w, leak = self.window, self.leak
        turns = (None, lambda i: w + leak * (i.double() - w) - i), (None, lambda j: leak * j.double() - j)
        yield _two_bands((first, last), w, *turns)


@dataclass(frozen=True)
class Bifocal:
    """Jet-Long: true distances near by; beyond, groups whose size follows from the query's own position.

    The authors take the group from the length of the text so far (G = ceil(L / trained)), so that it grows while a
    text is written and tokens in the cache were read under another; here each query takes its own, which is theirs for
    the last one, leaves every query within the trained length as it was, and makes cached and whole forwards equal.

    Attributes:
        window: distances up to and including it are as they are.
        trained: positions that the model knows.
    """

    window: int
    trained: int

    @property
    def plain(self) -> int:
        """The first ``trained`` queries have groups of one."""
        return self.trained

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """I // G - j // G beyond the window, G = i // trained + 1."""
        gap, group = query - key, query // self.trained + 1
        return torch.where(gap <= self.window, gap, query // group - key // group).double()

    def sees(self, query: Tensor, key: Tensor) -> None:
        """Everything."""

    def still(self, query: int) -> int:
        """The window and the query itself."""
        return self.window + 1

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Two bands for each size of groups."""
        while first < last:
            group = first // self.trained + 1
            end = min(last, group * self.trained)
            grouped = _Floored(group)
            yield _two_bands((first, end), self.window + 1, (None, grouped), (None, grouped))
            first = end


@dataclass(frozen=True)
class _Floored:
    """The turn from p to p // group."""

    group: int

    def __call__(self, place: Tensor) -> Tensor:
        return place // self.group - place


@dataclass(frozen=True)
class Chunked:
    """Dual chunk attention: keys are at their place within a chunk, queries within, after, or far behind it.

    2402.17463, section 3: the same chunk as it is; the one before exactly for ``local`` tokens, then at the most there
    is; all earlier ones at the most there is, ``chunk + local``.

    Attributes:
        chunk: tokens of a chunk.
        local: tokens over which the distance to the chunk before is exact.
        plain: see :class:`Remapping`.
    """

    chunk: int
    local: int
    plain: int

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """Same, next or further chunk."""
        gap, apart, place = query - key, query // self.chunk - key // self.chunk, key % self.chunk
        most = self.chunk + self.local
        after = (query % self.chunk + self.chunk).clamp(max=most) - place
        other = torch.where(apart == 1, after, most - place)
        return torch.where((apart == 0) | (query < self.plain), gap, other).double()

    def sees(self, query: Tensor, key: Tensor) -> None:
        """Everything."""

    def still(self, query: int) -> int:
        """Its own chunk."""
        return query % self.chunk + 1

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Three kinds for each chunk of queries."""
        size, most = self.chunk, self.chunk + self.local
        queries = (None, lambda i: (self.local - i % size).clamp(max=0), lambda i: most - i)
        keys = (None, lambda j: j % size - j)
        while first < last:
            own = first // size * size
            end = min(last, own + size)
            pieces = [*whole((first, end), own)]
            if own:
                pieces.append(Piece((first, end), (own - size, own), query_turn=1))
            if own > size:
                pieces.append(Piece((first, end), (0, own - size), query_turn=2, key_turn=1))
            yield Step((first, end), tuple(pieces), queries, keys)
            first = end


@dataclass(frozen=True)
class Sinks:
    """StreamingLLM: the first ``sinks`` tokens and the last ``window``, at their places among what is kept.

    2309.17453, section 3.2. Tokens in between are not seen at all.

    Attributes:
        sinks: first tokens that stay.
        window: last tokens that are seen, the query itself among them.
    """

    sinks: int
    window: int

    @property
    def plain(self) -> int:
        """As long as nothing is left out."""
        return self.sinks + self.window

    def distance(self, query: Tensor, key: Tensor) -> Tensor:
        """A sink is never further than the cache is long."""
        gap = query - key
        return torch.where(gap < self.window, gap, query.clamp(max=self.plain - 1) - key).double()

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Sinks and window."""
        return (query - key < self.window) | (key < self.sinks)

    def still(self, query: int) -> int:
        """The window."""
        return self.window

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """A band, and a rectangle of sinks."""
        here = (first, last)
        pieces = [*near(here, self.window)]
        if self.sinks:
            pieces.append(Piece(here, (0, self.sinks), query_turn=1))
        yield Step(here, tuple(pieces), (None, lambda i: self.plain - 1 - i))


def _two_bands(queries: tuple[int, int], width: int, query_turns: tuple, key_turns: tuple) -> Step:  # type: ignore[type-arg]
    pieces = (*near(queries, width), *far(queries, width, (1, 1)))
    return Step(queries, pieces, query_turns, key_turns)
