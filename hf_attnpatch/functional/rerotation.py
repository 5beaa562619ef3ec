"""Rotary states turned further: what was rotated for one position becomes what another position would have made of it.

Rotations of a plane add up, so that keys stay in the cache as the model rotated them, and attention that sees some of
them at other distances turns them by the difference (2104.09864, section 3.2). The angle is reduced in fp64, so that
a position of any size costs no precision, and applied in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]  # cosines and sines, (..., n, planes)


@dataclass(frozen=True, eq=False)
class Turning:
    """Which planes of a head turn, and how fast.

    Attributes:
        frequencies: (planes,), radians per position.
        interleaved: whether a plane is two neighbouring dimensions; otherwise its second lies ``planes`` further on.
        first: the dimension at which the turned ones begin.
    """

    frequencies: Tensor
    interleaved: bool = False
    first: int = 0

    def table(self, by: Tensor, dtype: torch.dtype = torch.float32) -> Table:
        """Cosines and sines of turning by so many positions.

        Args:
            by: (..., n), any real numbers.
            dtype: of the states; the table is in fp32 at least.
        """
        rounds = by.double()[..., None] * (self.frequencies.to(by.device).double() / (2 * math.pi))
        angles = (rounds - rounds.round()).mul_(2 * math.pi).to(torch.promote_types(dtype, torch.float32))
        return angles.cos(), angles.sin()

    def turn(self, states: Tensor, table: Table) -> Tensor:
        """Turn states.

        Args:
            states: (batch, heads, n, d).
            table: of the n positions, (n, planes) or (batch, n, planes).

        Returns:
            New states of the same shape and dtype.
        """
        cos, sin = (t if t.dim() == 2 else t[:, None] for t in table)
        planes, exact = cos.shape[-1], cos.dtype
        sizes = [self.first, 2 * planes, states.shape[-1] - self.first - 2 * planes]
        before, mine, after = states.split(sizes, -1)  # type: ignore[no-untyped-call]
        if self.interleaved:
            one, two = mine[..., ::2].to(exact), mine[..., 1::2].to(exact)
        else:
            one, two = (part.to(exact) for part in mine.chunk(2, -1))
        turned = (one * cos - two * sin, two * cos + one * sin)
        whole = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        whole = whole.to(states.dtype)
        return torch.cat([before, whole, after], -1) if states.shape[-1] > 2 * planes else whole
