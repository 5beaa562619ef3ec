"""Chooses the groups of one module, and computes the maps that merge them, for every method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UnsupportedArchitecture
from ..functional import partition
from ..functional.alignment import aligned
from ..functional.energy import Energies, key_energies, value_energies
from ..functional.merging import Sharing, calibrated_keys, calibrated_values
from ..functional.partition import Group
from ..sites import Site
from .calibration import Moments
from .frames import Symmetries
from .weights import HeadWeights


@dataclass(frozen=True)
class Merger:
    """The merges of one module.

    Attributes:
        site: the module.
        frames: its symmetries.
        moments: of its states, in the symmetries' scale.
        weights: its projections.
        method: of merging.
    """

    site: Site
    frames: Symmetries
    moments: Moments
    weights: HeadWeights
    method: str

    def groups(self, num_kv_heads: int, grouping: str | None) -> list[Group]:
        """Return the groups; None takes similar heads, if the module's heads can be reordered.

        Raises:
            UnsupportedArchitecture: similar heads are not adjacent, and the module keeps other parameters for each
                head.
        """
        heads = self.site.num_kv_heads
        if grouping == "adjacent" or (grouping is None and not self.frames.permutes):
            return partition.adjacent(heads, num_kv_heads)
        found = partition.similar(heads, num_kv_heads, self.lost)
        if not self.frames.permutes and found != partition.adjacent(heads, num_kv_heads):
            raise UnsupportedArchitecture(
                f"{self.site.path}: {self.site.kind} keeps other parameters for each head (slopes, gates, sinks), so "
                f"heads "
                "cannot be reordered; use grouping='adjacent'."
            )
        return found

    def lost(self, group: Group) -> float:
        """Return the share of a group's energy that a merge loses, keys and values together."""
        keys, values = self._energies
        return 2.0 - keys.share(group) - values.share(group)

    @cached_property
    def _energies(self) -> tuple[Energies, Energies]:
        m, heads, dim = self.moments, self.site.num_kv_heads, self.site.v_head_dim
        values = m.value.view(heads, dim, heads, dim)
        return (
            key_energies(self.frames.keys, m.key, m.mean, self._queries(tuple(range(heads)))),
            value_energies(self.frames.values, values, self._output(tuple(range(heads)))),
        )

    def keys(self, group: Group) -> Sharing:
        """Return the maps of keys and queries, in the scale of raw projections."""
        members = list(group)
        scale, queries = self.frames.key_scale[members], self._query_scale(group)
        if self.method == "procrustes":
            found = aligned(self.frames.keys, self.weights.key[members][..., :-1] * scale[:, :, None])
            found = replace(found, energy=self._principal_keys(group).energy)
        else:
            found = self._principal_keys(group)
        shared = found.shared * scale[:, None, :] / scale[:, :, None]
        return replace(found, shared=shared, reader=found.reader * queries[:, None, :] / queries[:, :, None])

    def values(self, group: Group) -> Sharing:
        """Return the maps of values and of the output projection's columns."""
        members = list(group)
        found = self._principal_values(group)
        if self.method != "procrustes":
            return found
        turned = aligned(self.frames.values, self.weights.value[members][..., :-1])
        return Sharing(turned.shared, turned.reader.transpose(1, 2), found.energy)

    def _principal_keys(self, group: Group) -> Sharing:
        members, m = list(group), self.moments
        keys = m.key[members][:, :, members]
        return calibrated_keys(self.frames.keys, keys, m.mean[members], self._queries(group))

    def _principal_values(self, group: Group) -> Sharing:
        members, heads, dim = list(group), self.site.num_kv_heads, self.site.v_head_dim
        moments = self.moments.value.view(heads, dim, heads, dim)
        return calibrated_values(self.frames.values, moments[members][:, :, members], self._output(group))

    def _queries(self, group: Group) -> Tensor:
        """E[q q^T] summed over the query heads of each member, (members, dim, dim)."""
        found = self.moments.query[self.weights.query_heads(group)]
        return found.view(len(group), -1, *found.shape[1:]).sum(1)

    def _output(self, group: Group) -> Tensor:
        """W^T W summed over the query heads of each member, (members, dim, dim)."""
        columns, dim = self.weights.output[:, self.weights.query_heads(group)], self.site.v_head_dim
        return torch.einsum("xha,xhb->hab", columns, columns).view(len(group), -1, dim, dim).sum(1)

    def _query_scale(self, group: Group) -> Tensor:
        repeats = self.site.num_heads // self.site.num_kv_heads
        return self.frames.query_scale[[m * repeats for m in group]]
