"""Attention at the distances of a :mod:`.spans`, for rows that begin at different places and caches with gaps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from .pieces import Step, scores, whole
from .pieces import attend as attend_pieces
from .rerotation import RotaryPlanes, Table
from .sinking import sdpa
from .spans import Remapping

FEW = 4  # queries that are cheaper one by one, each with the keys turned towards it


@dataclass(frozen=True)
class Row:
    """Where the tokens of a row are, once its padding is cut off.

    Attributes:
        lead: keys that are padding.
        end: keys up to the last query; behind them a cache of fixed length is empty.
        first: position of the first query that is no padding.
        last: one more than that of the last query.
        gap: positions that a cache has let go, from and to.
    """

    lead: int
    end: int
    first: int
    last: int
    gap: tuple[int, int]


@dataclass(frozen=True)
class Towards:
    """How one query sees its keys.

    Attributes:
        end: keys up to the query itself.
        table: by which the first of them are turned; None where they are seen as they are.
        seen: which of them are seen, (batch or 1, 1, 1, k), bool; None for all.
    """

    end: int
    table: Table | None
    seen: Tensor | None


def read_rows(places: Tensor, queries: int) -> list[Row]:
    """Read positions of keys, (batch, k), -1 for padding and for what is not filled yet; the queries are the last."""
    there, index = places >= 0, torch.arange(places.shape[1], device=places.device)
    ends = torch.where(there, index + 1, 0).amax(1)  # behind the last token of each row
    end = ends.max()
    lead = torch.where(there.any(1), there.to(torch.uint8).argmax(1), end)
    first = places.gather(1, torch.maximum(lead, end - queries).clamp(max=places.shape[1] - 1)[:, None])[:, 0]
    last = places.gather(1, (end - 1).clamp(min=0).expand(len(places))[:, None])[:, 0]
    strays = there & (places != index - lead[:, None])  # behind a gap
    jump = strays.to(torch.uint8).argmax(1)
    gap = (
        torch.where(strays.any(1), jump - lead, 0),
        torch.where(strays.any(1), places.gather(1, jump[:, None])[:, 0], 0),
    )
    columns = (lead, end.expand_as(lead), torch.where(lead < end, first, 0), last + 1, *gap)
    return [Row(a, b, c, d, (e, f)) for a, b, c, d, e, f in torch.stack(columns, 1).tolist()]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    span: Remapping,
    turning: RotaryPlanes,
    scale: float,
    steps: Sequence[Towards] | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend.

    Args:
        query: (batch, heads, q, d), as the model turned them.
        key: (batch, kv heads, k, d), likewise.
        value: (batch, kv heads, k, d_v).
        places: position of each key, (batch or 1, k), -1 where there is none; the queries are those of the last ones.
        span: distances.
        turning: how states turn.
        scale: on the inner products.
        steps: for few queries, what :func:`towards` returns: the same for layers that turn alike.
        sinks: a score for each head that takes its share of the weights, (heads,); None for none.

    Returns:
        (batch, heads, q, d_v); zeros for queries that are padding.
    """
    if query.shape[2] <= FEW:
        steps = towards(places, query.shape[2], span, turning, key.dtype) if steps is None else steps
        return _one_by_one(query, key, value, steps, turning, scale, sinks)

    def run(row: Row, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_pieces(query, key, value, _steps(row, span), turning, scale, row.gap, sinks)

    return _by_row(query, key, value, places, run)


def weights(query: Tensor, key: Tensor, places: Tensor, span: Remapping, turning: RotaryPlanes, scale: float) -> Tensor:
    """Scores of every query and key, (batch, heads, q, k), -inf where it is not seen; see :func:`attend`."""

    def run(row: Row, query: Tensor, key: Tensor, _: Tensor) -> Tensor:
        found = scores(query, key, _steps(row, span), turning, scale, row.gap)
        return F.pad(found, (row.lead, places.shape[1] - row.end), value=-torch.inf)

    return _by_row(query, key, key, places, run, -torch.inf)


def _by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    run: Callable[[Row, Tensor, Tensor, Tensor], Tensor],
    blank: float = 0.0,
) -> Tensor:
    """Run rows that begin at the same place together, without their padding; ``blank`` is for queries that are it."""
    alike: dict[Row, list[int]] = defaultdict(list)
    for n, row in enumerate(read_rows(places, query.shape[2])):
        alike[row].append(n)
    if places.shape[0] == 1:
        alike = {row: list(range(query.shape[0])) for row in alike}
    found: list[tuple[list[int], Tensor]] = []
    for row, numbers in alike.items():
        mine = [t if len(numbers) == query.shape[0] else t[numbers] for t in (query, key, value)]
        skipped = max(0, row.lead + query.shape[2] - row.end)
        keys, values = (t[:, :, row.lead : row.end] for t in mine[1:])
        if skipped == query.shape[2]:  # nothing but padding yet
            width = places.shape[1] if value is key else value.shape[-1]
            out = mine[0].new_full((*mine[0].shape[:3], width), blank)
        else:
            out = F.pad(run(row, mine[0][:, :, skipped:], keys, values), (0, 0, skipped, 0), value=blank)
        found.append((numbers, out))
    if len(found) == 1:
        return found[0][1]
    order = torch.tensor([n for numbers, _ in found for n in numbers], device=query.device)
    return torch.cat([out for _, out in found])[order.argsort()]


def _steps(row: Row, span: Remapping) -> list[Step]:
    steps, first = [], row.first
    if first < span.plain:
        here = (first, min(span.plain, row.last))
        steps.append(Step(here, tuple(whole(here))))
        first = here[1]
    return steps + list(span.steps(first, row.last)) if first < row.last else steps


def towards(places: Tensor, queries: int, span: Remapping, turning: RotaryPlanes, dtype: torch.dtype) -> list[Towards]:
    """Return for each of few queries how the keys are turned to where it sees them; see :func:`attend`."""
    index, padded = torch.arange(1, places.shape[1] + 1, device=places.device), bool((places[:, 0] < 0).any())
    end = max(queries, int(torch.where((places >= 0).any(0), index, 0).max()))
    found = []
    for stop in range(end - queries + 1, end + 1):
        here, there = places[:, stop - 1 : stop].clamp(min=0), places[:, :stop]
        rows = here.flatten().tolist()
        moved, table = max(0, stop - min(map(span.still, rows))), None
        if moved and max(rows) >= span.plain:
            by = here - span.distance(here, there[:, :moved]) - there[:, :moved]
            table = turning.table(by[0] if len(by) == 1 else by, dtype)
        seen = span.sees(here, there)
        if padded:
            seen = (there >= 0) if seen is None else seen & (there >= 0)
        found.append(Towards(stop, table, None if seen is None else seen[:, None, None]))
    return found


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    steps: Sequence[Towards],
    turning: RotaryPlanes,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Turn the keys to where each query sees them, and call torch's kernel: no merge, and rows need no sorting out."""
    outs = []
    for n, step in enumerate(steps):
        keys = key[:, :, : step.end]
        keys = keys if step.table is None else turning.turn_first(keys, step.table)
        outs.append(sdpa(query[:, :, n : n + 1], keys, value[:, :, : step.end], sinks, step.seen, False, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
