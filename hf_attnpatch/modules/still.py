"""What stays inside a model whose positions were exchanged: hooks and modules that hold no tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.deferring import deferred_view
from ..attention.rotation import PLACES, rotation_of
from ..upstream import words
from ..upstream.roles import Roles


class Still:
    """What marks a module as turning nothing."""


class ZeroAngles(Still):
    """Forward pre-hook of a rotary module: every token stands at position 0, which turns nothing.

    Args:
        roles: of the arguments of its forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put zeros in the place of the positions."""
        given = self.roles.bind(args, kwargs)
        given.put(words.POSITIONS, torch.zeros_like(given.get(words.POSITIONS)))
        return given.back()


class StillAngles(Still):
    """Forward pre-hook of an attention module that rotates by a table of its own: every token stands at position 0.

    Args:
        roles: of the arguments of the module's forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put zeros in the place of the positions, and keep those for a rotation of ours that has not run yet."""
        given = self.roles.bind(args, kwargs)
        places = given.get(words.POSITIONS)
        if rotation_of(module) is not None and not any(map(deferred_view, given.named.values())):
            given.named[PLACES] = places
        given.put(words.POSITIONS, torch.zeros_like(places))
        return given.back()


class NoPositions(nn.Module):
    """In the place of a position table: adds nothing, at any length."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a zero that broadcasts to whatever it is added to."""
        return torch.zeros((), dtype=torch.bfloat16)  # a scalar: takes the dtype and the device of what it meets


def turns_nothing(module: nn.Module) -> bool:
    """Whether a module that rotates was set to zero angles."""
    return any(isinstance(hook, Still) for hook in module._forward_pre_hooks.values())
