"""Rotary position embedding for models without it: a pre-hook, a cache that rotates keys, and an attention wrapper.

Keys are rotated once, at their own position, when they enter the cache; queries are rotated in the wrapper. Rotating at
the projections would be wrong: an adapter adds its part after any hook, unrotated. Between modules, state lives only in
a context variable that the wrapper consumes, so that threads, copies and gradient checkpointing (which reruns the hook)
work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..errors import AttnPatchError
from ..functional import rotary
from ..functional.turning import angles, turned
from ..upstream import words
from ..upstream.caches import Storing, view
from ..upstream.roles import ArgumentHook, Arguments
from .call import AttentionCall, Output
from .wrapper import Wrapper, wrapper_of

PLACES = "rotary_places"  # keyword that carries position_ids to attention modules which do not receive them
KINDS = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Rotation(Wrapper):
    """Rotary position embedding, shared by the attention modules of a model.

    Neither a module nor a buffer: the angles follow from these numbers, stay exact when the model is cast, and exist
    when the model is built on the meta device.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: number of dimensions of a head that are rotated.
        interleaved: whether adjacent dimensions form a pair; see :func:`hf_attnpatch.functional.turning.turned`.
        kind: scaling of the frequencies: ``default``, ``linear``, ``yarn`` or ``llama3``.
        factor: factor of the scaling.
        trained: context window in tokens on which the scaling is based.
    """

    name, order = "rotation", 0

    theta: float
    rotary_dim: int
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    trained: int = 0

    def frequencies(self) -> Tensor:
        """Frequencies in radians per position, (rotary_dim / 2,), fp32."""
        plain = rotary.default(self.theta, self.rotary_dim)
        if self.kind == "linear":
            return rotary.linear(plain, self.factor)
        if self.kind == "yarn":
            return rotary.yarn(self.theta, self.rotary_dim, self.factor, self.trained)
        return rotary.llama3(plain, self.factor, self.trained) if self.kind == "llama3" else plain

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at these positions, on their device."""
        attention = rotary.yarn_attention(self.factor) if self.kind == "yarn" else 1.0
        watched = _get_current_dispatch_mode() is not None  # fake tensors must not be mixed with cached real ones
        frequencies = self.frequencies() if watched else _frequencies(self, places.device)
        return angles(frequencies, places, attention)

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Rotate the queries, and the keys if they went through no cache."""
        owner, turn = _TURN.get() or (0, None)
        _TURN.set(None)
        if turn is None or owner != id(call.module):
            raise AttnPatchError(f"{type(call.module).__name__}: attends, but no positions were passed to it.")
        return inner(call.but(*turn.both(call.query, call.key)))


@functools.lru_cache(maxsize=64)
def _frequencies(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the frequencies on a device, cached: a copy in each layer would stall a GPU's queue."""
    with torch.inference_mode(False):
        return rotation.frequencies().to(device)


_TURN: ContextVar[tuple[int, Any] | None] = ContextVar("hf_attnpatch_turn", default=None)


class KeyRotation:
    """Rotates the queries and keys of one attention module in one forward.

    Args:
        rotation: frequencies and layout.
        places: positions of the new tokens, (batch or 1, length); None counts on from the end of the cache.
    """

    def __init__(self, rotation: Rotation, places: Tensor | None):
        self.rotation, self.places, self.keys_done = rotation, places, False
        self._angles: tuple[Tensor, Tensor] | None = None

    def begins(self, module: nn.Module) -> None:
        """Announce that the next attention call in this thread belongs to this module and forward."""
        _TURN.set((id(module), self))

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Store new keys, rotated at their own positions, and values."""
        return storing.store(self.keys(key, storing.past()), value)

    def keys(self, key: Tensor, past: Any) -> Tensor:
        """Rotate new keys that follow ``past`` cached ones."""
        if self.places is None:
            self.places = torch.arange(key.shape[2], device=key.device)[None] + past
        self.keys_done = True
        return self._turned(key)

    def both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the queries, and the keys if they went through no cache."""
        if not self.keys_done:
            key = self.keys(key, 0)
        return self._turned(query), key

    def _turned(self, states: Tensor) -> Tensor:
        assert self.places is not None
        if self._angles is None:
            self._angles = self.rotation.angles(self.places.to(states.device))
        return turned(states, *self._angles, self.rotation.interleaved)


class RotateKeys(ArgumentHook):
    """Forward pre-hook of a module that dispatches its attention: rotates its keys and queries."""

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Pass a cache that rotates keys."""
        rotation = rotation_of(module)
        if rotation is None:
            return False
        turn, cache = KeyRotation(rotation, taken_places(given)), given.get(words.CACHE)
        if cache is not None:
            given.put(words.CACHE, view(cache, turn.stored))
        turn.begins(module)
        return None


def taken_places(given: Arguments) -> Tensor | None:
    """Return the positions among a module's arguments, (batch or 1, length), or None; removes this package's keyword.

    Raises:
        AttnPatchError: the positions are not one number for each token.
    """
    handed = given.pop(PLACES)
    found = given.get(words.POSITIONS) if handed is None else handed
    if found is not None and found.dim() != 2:
        raise AttnPatchError(
            f"position_ids has shape {tuple(found.shape)}; pass one row of positions for each row of tokens."
        )
    return found if isinstance(found, Tensor) else None


class HandPlaces(ArgumentHook):
    """Forward pre-hook of the language model: passes positions to attention modules that do not receive them."""

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Pass the positions, if there are any, under another keyword."""
        given.named[PLACES] = given.get(words.POSITIONS)
        return given.named[PLACES] is not None


def rotation_of(module: nn.Module) -> Rotation | None:
    """Return the rotary embedding that this package gave an attention module, or None."""
    return wrapper_of(module, Rotation)


def frequencies_of(buffer: Any) -> Tensor:
    """Return frequencies in radians per position, from a buffer, from a table (GPT-J, CodeGen), or from wrappers."""
    if isinstance(buffer, tuple):  # the wrappers of a module that this package rotates
        return next(each.frequencies() for each in buffer if isinstance(each, Rotation))
    found: Tensor = buffer
    return found if found.dim() == 1 else rotary.default(10_000.0, found.shape[-1])
