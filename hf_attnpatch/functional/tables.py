"""Lengthens trained position tables: (rows, width) -> (length, width), with the trained rows first."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("tile", "interpolate", "hierarchical")
_SHARE = 0.4  # alpha of the hierarchical decomposition


def lengthened(table: Tensor, length: int, method: str) -> Tensor:
    """Return a table of so many rows, in the dtype of the old one; computed in fp64.

    Args:
        table: trained rows, (rows, width).
        length: new rows, at least as many; for ``hierarchical`` at most the square.
        method: ``tile`` repeats the rows (Longformer, 2004.05150, section 5); ``interpolate`` puts the trained
            positions at equal distances, ends on ends; ``hierarchical`` composes row i n + j from rows i and j (Su,
            2020) and leaves the trained ones as they are.
    """
    made = {"tile": _tiled, "interpolate": _interpolated, "hierarchical": _hierarchical}[method]
    return made(table.double(), length).to(table.dtype)


def _tiled(table: Tensor, length: int) -> Tensor:
    return table[torch.arange(length, device=table.device) % table.shape[0]]


def _interpolated(table: Tensor, length: int) -> Tensor:
    rows = table.shape[0]
    where = torch.arange(length, device=table.device, dtype=table.dtype) * (rows - 1) / max(length - 1, 1)
    low = where.floor().long()
    share = (where - low)[:, None]
    return (1 - share) * table[low] + share * table[(low + 1).clamp(max=rows - 1)]


def _hierarchical(table: Tensor, length: int) -> Tensor:
    """q[i n + j] = a u_i + (1 - a) u_j with u_i = (p_i - a p_0) / (1 - a); i = 0 gives p_j."""
    rows = table.shape[0]
    parts = (table - _SHARE * table[:1]) / (1 - _SHARE)
    index = torch.arange(length, device=table.device)
    made = _SHARE * parts[index // rows] + (1 - _SHARE) * parts[index % rows]
    return torch.cat([table, made[rows:]])
