"""Rotates heads towards each other before they are averaged, from weights alone (generalised Procrustes).

Ainslie et al. (2305.13245) average heads as they are; Jin et al. (2412.20677) first align them by the rotations that
RoPE allows. Heads that compute the same in other bases then merge without loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gauge import Frame, block_map, plane_map
from .merging import Sharing

ROUNDS = 30


def aligned(frame: Frame, rows: Tensor) -> Sharing:
    """Average heads after rotating each towards their mean: by a phase per plane, or freely where nothing rotates.

    Args:
        frame: of the head.
        rows: (members, dim, in_features), float64.

    Maps whose reader is orthogonal: it rotates queries like keys; for values its transpose belongs behind the output
        projection.
        projection.
    """
    members, dim = rows.shape[:2]
    turn = plane_map(_phases(frame, rows).t().conj(), frame.planes, dim)
    turn = turn + block_map(_rotations(rows[:, frame.block]), frame.block, dim)
    turn = turn + block_map(torch.eye(len(frame.fixed)), frame.fixed, dim)
    return Sharing(turn / members, turn)


def _phases(frame: Frame, rows: Tensor) -> Tensor:
    """Return unit factors u, (planes, members): conj(u) times a member's plane agrees best with the others'."""
    z = torch.complex(rows[:, frame.planes[:, 0]], rows[:, frame.planes[:, 1]]).transpose(0, 1)  # planes, members, in
    gram = z @ z.conj().transpose(1, 2)  # <z_i, z_j>
    u = torch.polar(torch.ones_like(gram.real[..., 0]), gram[..., 0].angle())
    for _ in range(ROUNDS):
        u = torch.sgn((gram @ u[..., None])[..., 0])
        u = torch.where(u == 0, torch.ones_like(u), u)
    return u


def _rotations(rows: Tensor) -> Tensor:
    """Return orthogonal matrices (members, size, size) that rotate each member's rows towards the mean of all."""
    mean = rows[0]
    for _ in range(ROUNDS):
        u, _, v = torch.linalg.svd(mean @ rows.transpose(1, 2))
        turn: Tensor = u @ v
        mean = (turn @ rows).mean(dim=0)
    return turn
