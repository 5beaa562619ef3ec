"""Attention sinks of a segment memory: the first tokens of each row, kept for good (2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..functional.segments import NOBODY

Layers = dict[int, tuple[Tensor, Tensor]]
_IN_A_CHECKPOINT = "sinks."


def _none() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.int64)


@dataclass(frozen=True)
class Sinks:
    """The held sinks.

    Attributes:
        layers: index of the attention module -> keys and values, each (batch, kv heads, sinks, d).
        number: token numbers, (batch, sinks), int64, on the CPU; -1 if a row has not read that far.
        turned: position for which each key was rotated, (batch, sinks), int64, on the CPU.
    """

    layers: Layers = field(default_factory=dict)
    number: Tensor = field(default_factory=_none)
    turned: Tensor = field(default_factory=_none)

    def without(self, rows: Tensor) -> Sinks:
        """Clear some rows."""
        number = self.number.clone()
        if len(number):
            number[rows] = NOBODY
        return replace(self, number=number)

    def before(self, count: Tensor) -> Sinks:
        """Drop sinks that are not among the first ``count`` tokens of their row, (batch,)."""
        if not len(self.number):
            return self
        return replace(self, number=torch.where(self.number < count[:, None], self.number, NOBODY))

    def select(self, rows: Tensor) -> Sinks:
        """Select rows in this order; a row may occur several times."""
        here = rows.cpu() if len(self.number) else slice(None)
        return Sinks(selected(self.layers, rows), self.number[here], self.turned[here])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sinks as named tensors; none if there are no sinks."""
        if not self.layers:
            return {}
        pairs = {f"{n}.{name}": t for n, pair in self.layers.items() for name, t in zip("kv", pair, strict=True)}
        return {
            _IN_A_CHECKPOINT + name: t for name, t in {**pairs, "number": self.number, "turned": self.turned}.items()
        }

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Sinks:
        """Load the result of :meth:`state_dict` from among other tensors."""
        own = {n.removeprefix(_IN_A_CHECKPOINT): t for n, t in state.items() if n.startswith(_IN_A_CHECKPOINT)}
        return cls(named_layers(own), own["number"].cpu(), own["turned"].cpu()) if own else cls()


class SinksOfCall:
    """The sinks of one call: those held before, and those among its tokens.

    Args:
        held: the memory's sinks.
        count: number of sinks wanted.
        number: token numbers of the call's columns, (batch, columns), int64.
        place: their positions.
    """

    def __init__(self, held: Sinks, count: int, number: Tensor, place: Tensor):
        batch, wanted = number.shape[0], torch.arange(count)
        self._held = held
        there = number[:, None] == wanted[:, None]  # batch, sinks, columns
        self._column = torch.where(there.any(-1), there.to(torch.uint8).argmax(-1), NOBODY)
        before = held.number if len(held.number) else number.new_full((batch, count), NOBODY)
        turned = held.turned if len(held.turned) else torch.zeros_like(before)
        fresh = self._column != NOBODY
        self.number = torch.where(fresh, wanted, before)
        self.turned = torch.where(fresh, place.gather(1, self._column.clamp(min=0)), turned)

    def states(self, layer: int, side: int, new: Tensor) -> Tensor:
        """Return keys (side 0) or values (1), (batch, kv heads, sinks, d), detached."""
        column = self._column.to(new.device)[:, None, :, None]
        found = new.detach().gather(2, column.clamp(min=0).expand(-1, new.shape[1], -1, new.shape[3]))
        pair = self._held.layers.get(layer)
        return found if pair is None else torch.where(column != NOBODY, found, pair[side])

    def kept(self, layers: Layers) -> Sinks:
        """Return the sinks to hold from now on."""
        return Sinks(layers, self.number, self.turned)


def selected(layers: Layers, rows: Tensor) -> Layers:
    """Select rows of keys and values."""
    return {n: (k[rows.to(k.device)], v[rows.to(v.device)]) for n, (k, v) in layers.items()}


def named_layers(state: Mapping[str, Tensor]) -> Layers:
    """Return keys and values from tensors named ``3.k`` and ``3.v``."""
    names = sorted({int(n.partition(".")[0]) for n in state if n.endswith((".k", ".v")) and n[0].isdigit()})
    return {n: (state[f"{n}.k"], state[f"{n}.v"]) for n in names}
