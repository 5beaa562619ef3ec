"""Attention with a bias by distance, for every mask, on whatever kernel torch has.

Three ways, all of the same result: columns (linear memory, flash speed: causal, no bias but the slope), two passes
(:mod:`.two_way`), and rows of a bias matrix for some queries at a time (linear memory: whatever else).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from .alibi import bias, bias_columns, columns, extended, offset, padding_columns
from .autocast import outside_autocast
from .sinking import HIDDEN, by_row, sdpa
from .two_way import two_way

FEW = 4  # queries for which a row of biases costs less than copying the keys
_CHUNK = 1 << 23  # biases that are in memory at once where rows of them are needed
UNSEEN = HIDDEN * 1e-3  # below it is a score that was hidden, and perhaps scaled afterwards


def few(queries: int) -> bool:
    """Whether rows of biases cost less than columns; a program that is exported for any number takes columns."""
    return not torch.compiler.is_exporting() and queries <= FEW


@dataclass(frozen=True)
class Distance:
    """How far counts.

    Attributes:
        slope: (heads,), fp64.
        clip: distances above it count as this one; None where there is no such.
        rounded: dtype to which slope times position is rounded, as BLOOM does; None for the exact product.
    """

    slope: Tensor
    clip: int | None = None
    rounded: torch.dtype | None = None


class Extension(Protocol):
    """A term of the scores that is an inner product of what a query's place and a key's place give."""

    def columns(self, here: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """(batch or 1, q) -> (batch, heads, q, c) and (1, 1, k, c), in the dtype of the queries."""

    def rows(self, here: Tensor, num_keys: int) -> Tensor:
        """The same multiplied out and scaled, (batch, heads, q, k)."""


@dataclass(frozen=True)
class Sight:
    """What a query sees.

    Attributes:
        causal: whether only what is before it.
        keep: (batch, k), bool: keys that are no padding; None if all are.
        mask: (batch or 1, heads or 1, q, k), bool, or float that is added; all of the truth where it is given.
        made: the mask of the whole forward that says the same, where another form of it is wanted; None if unknown.
    """

    causal: bool
    keep: Tensor | None = None
    mask: Tensor | None = None
    made: Any = None


Made = TypeVar("Made")
Once = Callable[[Hashable, Callable[[], Made]], Made]


def _each_time(_: Hashable, make: Callable[[], Made]) -> Made:
    return make()


@outside_autocast
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance: Distance,
    sight: Sight,
    scale: float,
    dropout: float = 0.0,
    once: Once[Any] = _each_time,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention biased by distance.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d); key j is at position j.
        value: (batch, kv heads, k, d_v).
        distance: slopes, and what counts as distance.
        sight: who sees whom. Without a mask one query stands at the last key, several at the first ones (a prefill
            into a cache of fixed length, the rest of which is empty).
        scale: on the inner products.
        dropout: probability of dropping an attention weight.
        once: makes what layers of one forward share, and keeps it under a key; by default it is made each time.
        sinks: a score for each head that takes its share of the weights, see :mod:`.sinking`; None for none.

    Returns:
        (batch, heads, q, d_v).
    """
    key, value, sight = _filled(query, key, value, sight)
    args = (query, key, value, distance, sight, scale)
    if distance.clip is not None or few(query.shape[2]):
        return _rows(*args, dropout, once, sinks)
    if sight.causal:
        return _columns(*args, dropout, once, sinks)
    on_cpu = query.device.type == "cpu"
    if dropout > 0 or sinks is not None or sight.mask is not None or distance.rounded is not None or not on_cpu:
        return _rows(*args, dropout, sinks=sinks)
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    return two_way(query, key, value, distance.slope, scale, sight.keep)


@outside_autocast
def attend_with(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sight: Sight, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention with a bias that depends on head and key alone, (batch or 1, heads, k): BLOOM's or MPT's own ALiBi.

    The other arguments are those of :func:`attend`.
    """
    key, value, sight = _filled(query, key, value, sight)
    here = positions(query, key, sight)
    if bias is None:
        added = None if sight.keep is None else padding_columns(here, query.dtype, sight.keep)
        return _on_columns(query, key, value, added, sight, scale, dropout)
    bias = bias[..., : key.shape[2]]
    if few(query.shape[2]):
        rows = _centred(bias, here).to(_exact(query))
        return _dense(query, key, value, _seen(rows, here, sight, slice(None)), scale, dropout)
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    added = bias_columns(bias, scale, here, query.dtype, sight.keep)
    return _on_columns(query, key, value, added, sight, scale, dropout)


def attend_extended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extension: Extension,
    sight: Sight,
    scale: float,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same with scores that depend on the query as well, as an inner product of further dimensions.

    The other arguments are those of :func:`attend`.
    """
    key, value, sight = _filled(query, key, value, sight)
    here = positions(query, key, sight)
    if few(query.shape[2]):
        rows = extension.rows(here, key.shape[2])
        return _dense(query, key, value, _seen(rows, here, sight, slice(None)), scale, dropout, sinks)
    left, right = extension.columns(here, key.shape[2])
    if sight.keep is not None:
        padding = padding_columns(here, query.dtype, sight.keep)
        batch = query.shape[0]
        left, right = (
            torch.cat([a.expand(batch, b.shape[1], -1, -1), b.expand(batch, -1, -1, -1)], -1)
            for a, b in zip(padding, (left, right), strict=True)
        )
    return _on_columns(query, key, value, (left, right), sight, scale, dropout, sinks)


def _filled(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Sight]:
    """Leave away the empty rest of a cache of fixed length."""
    n = query.shape[2]
    if sight.mask is not None or not sight.causal or not 1 < n < key.shape[2]:
        return key, value, sight
    return key[:, :, :n], value[:, :, :n], Sight(True, None if sight.keep is None else sight.keep[:, :n])


def _columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance: Distance,
    sight: Sight,
    scale: float,
    dropout: float,
    once: Once[Any] = _each_time,
    sinks: Tensor | None = None,
) -> Tensor:
    here, keep = positions(query, key, sight), sight.keep
    if sinks is not None and distance.rounded is None:  # scores are the bias and a constant for each query
        beside = offset(distance.slope.to(query.device), scale, here, key.shape[2], query.dtype)
        sinks = (by_row(sinks) + beside.to(_exact(query)))[..., None]
    if distance.rounded is None:
        slope, keys = distance.slope, key.shape[2]
        added = once(
            ("columns", scale, query.shape[1:3], keys, query.dtype, query.device),
            lambda: columns(slope.to(query.device), scale, here, keys, query.dtype, keep),
        )
    else:
        key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
        added = bias_columns(_products(distance, key, keep), scale, here, query.dtype, keep)
    return _on_columns(query, key, value, added, sight, scale, dropout, sinks)


def _on_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: tuple[Tensor, Tensor] | None,
    sight: Sight,
    scale: float,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Run torch's kernel on queries and keys with columns, and cut the output to size."""
    width = value.shape[-1]
    if sight.mask is not None and query.device.type != "cpu":  # no kernel there takes a mask and grouped heads
        key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    if added is not None:
        query, key, value = extended(query, key, value, added)
    mask = None if sight.mask is None else _fitting(sight.mask, query)
    out = sdpa(query, key, value, sinks, mask, sight.causal and mask is None and query.shape[2] > 1, scale, dropout)
    return out[..., :width]


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance: Distance,
    sight: Sight,
    scale: float,
    dropout: float,
    once: Once[Any] = _each_time,
    sinks: Tensor | None = None,
) -> Tensor:
    """Some queries at a time, so that memory stays linear."""
    if few(query.shape[2]):
        biases = once(
            ("rows", query.shape[1:3], key.shape[2], query.dtype, query.device),
            lambda: bias_rows(distance, positions(query, key, sight), key, sight).to(_exact(query)),
        )
        return _dense(query, key, value, biases, scale, dropout, sinks)
    here, pieces = positions(query, key, sight), []
    step = max(1, _CHUNK // (query.shape[1] * key.shape[2] * here.shape[0]))
    for start in range(0, query.shape[2], step):
        part = slice(start, start + step)
        biases = bias_rows(distance, here[:, part], key, sight, part).to(_exact(query))
        pieces.append(_dense(query[:, :, part], key, value, biases, scale, dropout, sinks))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def bias_rows(
    distance: Distance,
    here: Tensor,
    key: Tensor,
    sight: Sight,
    part: slice = slice(None),  # noqa: B008 - a constant
) -> Tensor:
    """Rows of the bias matrix with what a query does not see hidden, (batch or 1, heads, rows, k), fp64.

    Args:
        distance: slopes, and what counts as distance.
        here: positions of the rows, (batch or 1, rows).
        key: the keys.
        sight: who sees whom.
        part: which rows of ``sight.mask`` these are.
    """
    slope = distance.slope.to(key.device)
    if distance.rounded is None:
        biases = bias(slope, here, torch.arange(key.shape[2], device=key.device), distance.clip)
    else:
        biases = _centred(_products(distance, key, sight.keep), here)
    return _seen(biases, here, sight, part)


def hiding(mask: Tensor) -> Tensor:
    """A mask that is added, with ``HIDDEN`` in it: float16 has no such number, and hides by its lowest."""
    if mask.dtype != torch.float16:
        return mask
    return mask.float().masked_fill(mask <= torch.finfo(torch.float16).min / 2, HIDDEN)


def _seen(biases: Tensor, here: Tensor, sight: Sight, part: slice) -> Tensor:
    """Hide what the queries do not see."""
    if sight.mask is not None:
        mask = sight.mask[:, :, part]
        return biases.masked_fill(~mask, HIDDEN) if mask.dtype == torch.bool else biases + mask
    if sight.causal:
        keys = torch.arange(biases.shape[-1], device=here.device)
        biases = biases.masked_fill((keys > here[..., None])[:, None], HIDDEN)
    return biases if sight.keep is None else biases.masked_fill(~sight.keep[:, None, None], HIDDEN)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Tensor,
    scale: float,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    if sinks is None and biases.dtype != query.dtype and query.device.type != "cpu":  # refused there, or silently wrong
        return _written_out(query, key, value, biases, scale, dropout)
    return sdpa(query, key, value, sinks, biases, False, scale, dropout)


def _fitting(mask: Tensor, query: Tensor) -> Tensor:
    """Give a mask that is added the dtype of the queries, which kernels ask for that are not the CPU's."""
    if mask.dtype in (torch.bool, query.dtype) or query.device.type == "cpu":
        return mask
    return mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)


def _written_out(query: Tensor, key: Tensor, value: Tensor, biases: Tensor, scale: float, dropout: float) -> Tensor:
    """The same for a kernel that wants a bias in the dtype of the queries: scores in fp32, one by one."""
    batch, heads, rows, _ = query.shape
    folded = query.reshape(batch, key.shape[1], -1, query.shape[-1])  # heads that share a key go through one product
    scores = (folded.to(biases) @ key.to(biases).transpose(-1, -2)).view(batch, heads, rows, -1)
    weights = F.dropout((scale * scores + biases).softmax(-1), dropout).to(value.dtype)
    return (weights.view(batch, key.shape[1], -1, key.shape[2]) @ value).view(batch, heads, rows, -1)


def positions(query: Tensor, key: Tensor, sight: Sight) -> Tensor:
    """Return the key at whose place each query stands, (batch or 1, q): with a causal mask, the last that it sees."""
    if sight.causal and sight.mask is None and sight.keep is not None and query.shape[2] == 1:
        return _last(sight.keep[:, None])  # behind it, a cache of fixed length is empty
    if sight.mask is None or not sight.causal:
        first = key.shape[2] - query.shape[2]
        return torch.arange(first, key.shape[2], device=query.device)[None]
    mask = sight.mask[:, 0]
    visible = mask if mask.dtype == torch.bool else mask > UNSEEN
    return _last(visible)


def _last(visible: Tensor) -> Tensor:
    """Index of the last True along the last dimension."""
    return visible.shape[-1] - 1 - visible.flip(-1).to(torch.uint8).argmax(-1)


def _products(distance: Distance, key: Tensor, keep: Tensor | None) -> Tensor:
    """Slope times position, rounded as the dtype does, (batch or 1, heads, k); positions count what is no padding."""
    assert distance.rounded is not None
    count = torch.arange(key.shape[2], device=key.device)[None]
    count = count if keep is None else (keep.long().cumsum(-1) - 1) * keep
    return (distance.slope.to(key.device, torch.float32)[:, None] * count[:, None]).to(distance.rounded)


def _centred(biases: Tensor, here: Tensor) -> Tensor:
    """(batch, heads, k) and (batch, q) -> (batch, heads, q, k): the biases less that at the query, fp64."""
    batch, wide = max(biases.shape[0], here.shape[0]), biases.double()
    wide, index = wide.expand(batch, -1, -1), here[:, None].expand(batch, biases.shape[1], -1)
    return wide[:, :, None] - wide.gather(2, index)[..., None]


def _exact(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _repeated(states: Tensor, heads: int) -> Tensor:
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], 1)
