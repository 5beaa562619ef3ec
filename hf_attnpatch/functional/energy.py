"""The energy that a merge of any group would keep: eigenvalues of one set of weighted second moments, without maps.

The same figure as ``Sharing.energy`` of :func:`merging.calibrated_keys` and `calibrated_values`, without the weights,
roots and maps of every candidate group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gauge import Frame, complex_planes
from .merging import kept, roots


@dataclass(frozen=True)
class Energies:
    """Weighted moments of all heads of a module, float64.

    Attributes:
        frame: of the heads.
        planes: (planes, heads, heads), complex: keys in each rotating plane.
        block: (heads, size, heads, size): where nothing rotates.
        states: (heads, dim, heads, dim), unweighted, for dimensions that allow nothing.
        weights: (heads, dim, dim), of those.
    """

    frame: Frame
    planes: Tensor
    block: Tensor
    states: Tensor
    weights: Tensor

    def share(self, group: Sequence[int]) -> float:
        """The share of the energy of some heads that one in their place keeps, in [0, 1]."""
        members, size = list(group), self.block.shape[1]
        planes = torch.linalg.eigvalsh(self.planes[:, members][:, :, members]) / 2  # a phase turns: half of the energy
        flat = self.block[members][:, :, members].reshape(len(members) * size, len(members) * size)
        block = torch.linalg.eigvalsh(flat)
        _, _, still, all_still = kept(self.frame, self.states[members][:, :, members], self.weights[members])
        total = float(planes.sum() + block.sum()) + all_still
        found = float(planes[:, -1:].sum() + block[len(block) - size :].sum()) + still
        return found / total if total else 1.0


def key_energies(frame: Frame, keys: Tensor, means: Tensor, queries: Tensor) -> Energies:
    """Weigh the keys of all heads by their queries; arguments as of :func:`merging.calibrated_keys`."""
    x, y = frame.planes[:, 0], frame.planes[:, 1]
    weight = (queries[:, x, x] + queries[:, y, y]).sqrt().t()  # planes, heads
    planes = complex_planes(keys, frame.planes) * weight[:, :, None] * weight[:, None, :]
    centred = keys - means[:, :, None, None] * means[None, None]
    return Energies(frame, planes, _weighted(frame, centred, queries), keys, queries)


def value_energies(frame: Frame, values: Tensor, output: Tensor) -> Energies:
    """Weigh the values of all heads by what reads them; arguments as of :func:`merging.calibrated_values`."""
    none = complex_planes(values, frame.planes)
    return Energies(frame, none, _weighted(frame, values, output), values, output)


def _weighted(frame: Frame, moments: Tensor, weights: Tensor) -> Tensor:
    block = frame.block
    moments = moments[:, block][:, :, :, block]
    root, _ = roots(weights[:, block[:, None], block])
    return torch.einsum("iab,ibjc,jcd->iajd", root, moments, root)
