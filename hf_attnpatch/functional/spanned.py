"""Attention at the distances of a :mod:`.spans`, for rows that begin at different places and caches with gaps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from .pieces import Step, scores, whole
from .pieces import attend as attend_pieces
from .rerotation import Turning
from .spans import Span

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


def read_rows(places: Tensor, queries: int) -> list[Row]:
    """Read positions of keys, (batch, k), -1 for padding and for what is not filled yet; the queries are the last."""
    end = int((places >= 0).any(0).nonzero().max()) + 1
    found = []
    for row in places[:, :end].tolist():
        lead = sum(place < 0 for place in row)
        first = row[max(lead, end - queries)] if lead < end else 0
        found.append(Row(lead, end, first, row[-1] + 1, _gap(row, lead)))
    return found


def _gap(row: list[int], lead: int) -> tuple[int, int]:
    """Return the positions that are missing after the first ones."""
    if row[-1] in (-1, len(row) - 1 - lead):
        return 0, 0
    jump = next(n for n in range(lead, len(row)) if row[n] != n - lead)
    return jump - lead, row[jump]


def all_plain(places: Tensor, span: Span) -> bool:
    """Whether every query sees everything at its distance."""
    return int(places.max()) < span.plain


def attend(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, span: Span, turning: Turning, scale: float
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

    Returns:
        (batch, heads, q, d_v); zeros for queries that are padding.
    """
    if query.shape[2] <= FEW:
        return _one_by_one(query, key, value, places, span, turning, scale)

    def run(row: Row, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_pieces(query, key, value, _steps(row, span), turning, scale, row.gap)

    return _by_row(query, key, value, places, run)


def weights(query: Tensor, key: Tensor, places: Tensor, span: Span, turning: Turning, scale: float) -> Tensor:
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


def _steps(row: Row, span: Span) -> list[Step]:
    steps, first = [], row.first
    if first < span.plain:
        here = (first, min(span.plain, row.last))
        steps.append(Step(here, tuple(whole(here))))
        first = here[1]
    return steps + list(span.steps(first, row.last)) if first < row.last else steps


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, span: Span, turning: Turning, scale: float
) -> Tensor:
    """Turn the keys to where each query sees them, and call torch's kernel: no merge, and rows need no sorting out."""
    rows = read_rows(places, query.shape[2])
    outs = []
    for n in range(query.shape[2]):
        end = rows[0].end - query.shape[2] + n + 1
        here, there = places[:, end - 1 : end].clamp(min=0), places[:, :end]
        moved = max(0, end - min(span.still(int(p)) for p in here.flatten().tolist()))
        if moved and bool((here >= span.plain).any()):
            by = here - span.distance(here, there[:, :moved]) - there[:, :moved]
            table = turning.table(by[0] if len(by) == 1 else by, key.dtype)
            keys = turning.turn_first(key[:, :, :end], table)
        else:
            keys = key[:, :, :end]
        seen = span.sees(here, there)
        if any(row.lead for row in rows):
            seen = (there >= 0) if seen is None else seen & (there >= 0)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, n : n + 1],
                keys,
                value[:, :, :end],
                attn_mask=None if seen is None else seen[:, None, None],
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)
