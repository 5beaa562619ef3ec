"""Hooks that fix rotation at position 0, and a module in place of a position table; none holds a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention.deferring import deferred_view
from ..attention.rotation import PLACES, rotation_of
from ..upstream import words
from ..upstream.roles import ArgumentHook, Arguments


class Still(ArgumentHook):
    """Base class of hooks that disable a module's rotation."""


class ZeroAngles(Still):
    """Forward pre-hook of a rotary module: gives every token position 0, which rotates nothing."""

    def edit(self, module: nn.Module, given: Arguments) -> None:
        """Replace the positions by zeros."""
        given.put(words.POSITIONS, torch.zeros_like(given.get(words.POSITIONS)))


class StillAngles(Still):
    """Forward pre-hook of an attention module that rotates by its own table: gives every token position 0."""

    def edit(self, module: nn.Module, given: Arguments) -> None:
        """Replace the positions by zeros; keep them for a rotation of this package that has not run yet."""
        places = given.get(words.POSITIONS)
        if rotation_of(module) is not None and not any(map(deferred_view, given.named.values())):
            given.named[PLACES] = places
        given.put(words.POSITIONS, torch.zeros_like(places))


class NoPositions(nn.Module):
    """Replaces a position table: adds nothing, at any length."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a zero that broadcasts to whatever it is added to."""
        return torch.zeros((), dtype=torch.bfloat16)  # a scalar adopts the dtype and device of the other operand


def turns_nothing(module: nn.Module) -> bool:
    """Return whether a module's rotation is fixed at position 0."""
    return any(isinstance(hook, Still) for hook in module._forward_pre_hooks.values())
