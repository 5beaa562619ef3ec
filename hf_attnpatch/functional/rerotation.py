"""Rotates rotary states further: from the position for which they were rotated to another.

Rotations of a plane add up. Keys therefore stay in the cache as the model rotated them, and attention that sees them at
other distances rotates them by the difference (2104.09864, section 3.2). The angle is reduced in fp64, so that large
positions cost no precision, and applied in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256  # states that are rotated at once
Table = tuple[Tensor, Tensor]  # cosines and sines, (..., n, planes)


@dataclass(frozen=True, eq=False)
class RotaryPlanes:
    """The rotated planes of a head, and their frequencies.

    Attributes:
        frequencies: (planes,), radians per position.
        interleaved: whether a plane is two adjacent dimensions; otherwise its second one is ``planes`` further.
        first: the first rotated dimension.
    """

    frequencies: Tensor
    interleaved: bool = False
    first: int = 0

    def table(self, by: Tensor, dtype: torch.dtype = torch.float32) -> Table:
        """Return cosines and sines for a rotation by this many positions.

        Args:
            by: (..., n), any real numbers.
            dtype: of the states; the table is in fp32 at least.
        """
        rounds = by.double()[..., None] * (self.frequencies.to(by.device).double() / (2 * math.pi))
        angles = (rounds - rounds.round()).mul_(2 * math.pi).to(torch.promote_types(dtype, torch.float32))
        return angles.cos(), angles.sin()

    def turn(self, states: Tensor, table: Table) -> Tensor:
        """Rotate states.

        Args:
            states: (batch, heads, n, d).
            table: of the n positions, (n, planes) or (batch, n, planes).

        Returns:
            New states of the same shape and dtype.
        """
        cos, sin = (t if t.dim() == 2 else t[:, None] for t in table)
        planes, exact = cos.shape[-1], cos.dtype
        last = self.first + 2 * planes
        before, mine, after = states[..., : self.first], states[..., self.first : last], states[..., last:]
        if self.interleaved:
            one, two = mine[..., ::2].to(exact), mine[..., 1::2].to(exact)
        else:
            one, two = (part.to(exact) for part in mine.chunk(2, -1))
        turned = (one * cos - two * sin, two * cos + one * sin)
        whole = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        whole = whole.to(states.dtype)
        return torch.cat([before, whole, after], -1) if states.shape[-1] > 2 * planes else whole

    def turn_first(self, states: Tensor, table: Table) -> Tensor:
        """Rotate the first states, as many as the table has, and leave those behind them; see :meth:`turn`.

        Without gradients, in blocks that stay in the processor's cache.
        """
        count, planes, last = table[0].shape[-2], table[0].shape[-1], self.first + 2 * table[0].shape[-1]
        if torch.is_grad_enabled() or states.dtype != table[0].dtype:
            return torch.cat([self.turn(states[:, :, :count], table), states[:, :, count:]], 2)
        out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
        out[:, :, count:] = states[:, :, count:]
        halves = (slice(self.first, last, 2), slice(self.first + 1, last, 2))
        if not self.interleaved:
            halves = (slice(self.first, self.first + planes), slice(self.first + planes, last))
        for start in range(0, count, _BLOCK):
            here = slice(start, min(start + _BLOCK, count))
            cos, sin = (t[here] if t.dim() == 2 else t[:, None, here] for t in table)
            one, two = (states[:, :, here, half] for half in halves)
            new_one, new_two = (out[:, :, here, half] for half in halves)
            torch.mul(one, cos, out=new_one).addcmul_(two, sin, value=-1)
            torch.mul(two, cos, out=new_two).addcmul_(one, sin)
            for rest in (slice(0, self.first), slice(last, states.shape[-1])):
                if rest.start < rest.stop:
                    out[:, :, here, rest] = states[:, :, here, rest]
        return out
