"""What rotates queries and keys in models that do not: a hook before attention, a view of its cache, a wrapper after.

Keys are rotated on their way into the cache, once, at their own position; queries when the wrapper gets them. Not at
the projections: an adapter on those adds its part after any hook, and it would stay unrotated. Nothing is remembered
between modules but in a context variable that the wrapper empties, so that threads, copies and gradient checkpointing
(which runs the hook again) just work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
from ..upstream.roles import Arguments, Roles
from .call import AttentionCall, Output
from .wrapper import Wrapper, wrapper_of

PLACES = "rotary_places"  # keyword under which position_ids travel to attention modules that do not get them
KINDS = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Rotation(Wrapper):
    """How a model rotates, shared by its attention modules.

    Not a module and no buffer: angles follow from these numbers, stay exact when the model is cast, and are there when
    it is built on the meta device.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: dimensions of a head that are rotated.
        interleaved: whether pairs are neighbours; see :func:`hf_attnpatch.functional.turning.turned`.
        kind: ``default``, ``linear``, ``yarn`` or ``llama3``.
        factor: of the kind.
        trained: window in tokens that the kind refers to.
    """

    name, order = "rotation", 0

    theta: float
    rotary_dim: int
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    trained: int = 0

    def frequencies(self) -> Tensor:
        """Radians per position, (rotary_dim / 2,), fp32."""
        plain = rotary.default(self.theta, self.rotary_dim)
        if self.kind == "linear":
            return rotary.linear(plain, self.factor)
        if self.kind == "yarn":
            return rotary.yarn(self.theta, self.rotary_dim, self.factor, self.trained)
        return rotary.llama3(plain, self.factor, self.trained) if self.kind == "llama3" else plain

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine at these positions, on their device."""
        attention = rotary.yarn_attention(self.factor) if self.kind == "yarn" else 1.0
        watched = _get_current_dispatch_mode() is not None  # tensors without data must not meet those that are kept
        frequencies = self.frequencies() if watched else _frequencies(self, places.device)
        return angles(frequencies, places, attention)

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Rotate queries, and keys that met no cache."""
        owner, turn = _TURN.get() or (0, None)
        _TURN.set(None)
        if turn is None or owner != id(call.module):
            raise AttnPatchError(f"{type(call.module).__name__}: attends without having been told its positions.")
        return inner(call.but(*turn.both(call.query, call.key)))


@functools.lru_cache(maxsize=64)
def _frequencies(rotation: Rotation, device: torch.device) -> Tensor:
    """The frequencies on a device, made once: a copy for each layer would stop a GPU's queue."""
    with torch.inference_mode(False):
        return rotation.frequencies().to(device)


_TURN: ContextVar[tuple[int, Any] | None] = ContextVar("hf_attnpatch_turn", default=None)


class KeyRotation:
    """The rotation of one attention module in one forward.

    Args:
        rotation: how.
        places: positions of the new tokens, (batch or 1, length); None counts from the end of the cache.
    """

    def __init__(self, rotation: Rotation, places: Tensor | None):
        self.rotation, self.places, self.keys_done = rotation, places, False
        self._angles: tuple[Tensor, Tensor] | None = None

    def begins(self, module: nn.Module) -> None:
        """Say that the next attention in this thread is that of the module, in this forward."""
        _TURN.set((id(module), self))

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Store new keys, rotated at their own positions, and values."""
        return storing.store(self.keys(key, storing.past()), value)

    def keys(self, key: Tensor, past: Any) -> Tensor:
        """Rotate new keys before they are stored behind ``past`` others."""
        if self.places is None:
            self.places = torch.arange(key.shape[2], device=key.device)[None] + past
        self.keys_done = True
        return self._turned(key)

    def both(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries, and keys that met no cache."""
        if not self.keys_done:
            key = self.keys(key, 0)
        return self._turned(query), key

    def _turned(self, states: Tensor) -> Tensor:
        assert self.places is not None
        if self._angles is None:
            self._angles = self.rotation.angles(self.places.to(states.device))
        return turned(states, *self._angles, self.rotation.interleaved)


class RotateKeys:
    """Forward pre-hook of a module that asks the registry for its attention: keys will be rotated, queries too.

    Args:
        roles: of the arguments of the module's forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand over a cache that rotates."""
        rotation = rotation_of(module)
        if rotation is None:
            return None
        given = self.roles.bind(args, kwargs)
        turn, cache = KeyRotation(rotation, taken_places(given)), given.get(words.CACHE)
        if cache is not None:
            given.put(words.CACHE, view(cache, turn.stored))
        turn.begins(module)
        return given.back()


def taken_places(given: Arguments) -> Tensor | None:
    """Return the positions among a module's arguments, (batch or 1, length), or None; our own keyword is taken out.

    Raises:
        AttnPatchError: positions that are not one number for each token.
    """
    handed = given.pop(PLACES)
    found = given.get(words.POSITIONS) if handed is None else handed
    if found is not None and found.dim() != 2:
        raise AttnPatchError(
            f"position_ids of shape {tuple(found.shape)}; one row of positions for each row of tokens."
        )
    return found if isinstance(found, Tensor) else None


class HandPlaces:
    """Forward pre-hook of the language model: hands positions to attention modules that would not get them.

    Args:
        roles: of the arguments of its forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pass them on under another name, where there are any."""
        found = self.roles.bind(args, kwargs).get(words.POSITIONS)
        return None if found is None else (args, {**kwargs, PLACES: found})


def rotation_of(module: nn.Module) -> Rotation | None:
    """Return the rotation of an attention module that this package gave one, or None."""
    return wrapper_of(module, Rotation)


def frequencies_of(buffer: Any) -> Tensor:
    """Return frequencies in radians per position: of a buffer, of GPT-J's and CodeGen's tables, of a rotation."""
    if isinstance(buffer, tuple):  # the wrappers of a module that this package made rotate
        return next(each.frequencies() for each in buffer if isinstance(each, Rotation))
    found: Tensor = buffer
    return found if found.dim() == 1 else rotary.default(10_000.0, found.shape[-1])
