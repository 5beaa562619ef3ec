"""Finds how a family rotates keys, by comparing the keys at two positions.

This needs no table of families: every known layout of a rotation is tried with every frequency table of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy, angle_table
from ..attention.rotation import frequencies_of
from ..functional.rerotation import RotaryPlanes
from ..probe import TOLERANCE, largest_difference
from ..upstream.roles import frequencies

STATIC = ("default", "linear", "yarn", "llama3", "proportional")  # kinds whose angles do not depend on the length
BY = 7  # difference in position between the two runs
Way = tuple[str, str, bool, int]  # rotary module, its buffer, interleaved, first dimension


def allowed(dtype: torch.dtype) -> float:
    """Return the relative difference allowed between states; angles are fp32 in every model."""
    return 5 * max(TOLERANCE.get(dtype, 1e-2), TOLERANCE[torch.float32])


def way_of(model: PreTrainedModel, anatomy: Anatomy, pairs: Sequence[tuple[Tensor, Tensor]]) -> Way | None:
    """Return how states were rotated by ``BY`` positions, or None if no known rotation matches.

    Args:
        model: the model.
        anatomy: the model's anatomy.
        pairs: states before and after, (batch, heads, n, d).
    """
    for path, buffer, turning in _candidates(model, anatomy, pairs[0][0].shape[-1]):
        if all(_agrees(turning, before, after) for before, after in pairs):
            return path, buffer, turning.interleaved, turning.first
    return None


def tables(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Return the names of the frequency tables that were tried."""
    return sorted({f"{path}.{buffer}" for path, buffer, _ in _candidates(model, anatomy, 1 << 30)})


def _agrees(turning: RotaryPlanes, before: Tensor, after: Tensor) -> bool:
    by = turning.table(torch.full((before.shape[2],), BY, device=before.device), before.dtype)
    return largest_difference(after, turning.turn(before, by)) <= allowed(before.dtype)


def _candidates(model: PreTrainedModel, anatomy: Anatomy, width: int) -> Iterator[tuple[str, str, RotaryPlanes]]:
    for path in anatomy.inner:
        table = str(angle_table(model.get_submodule(path)))
        for interleaved in (False, True):
            yield path, table, RotaryPlanes(frequencies_of(getattr(model.get_submodule(path), table)), interleaved, 0)
    for rotary in anatomy.rotary:
        for name, buffer in frequencies(model.get_submodule(rotary.path)).items():
            if "original" in name or 2 * len(buffer) > width:
                continue
            for first in dict.fromkeys((0, width - 2 * len(buffer))):
                for interleaved in (False, True):
                    yield rotary.path, name, RotaryPlanes(buffer, interleaved, first)
