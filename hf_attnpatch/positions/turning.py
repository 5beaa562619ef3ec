"""What rotates queries and keys in models that do not: a hook before attention, a view of its cache, a function after.

Keys are rotated on their way into the cache, once, at their own position; queries when the registered attention
function gets them. Not at the projections: an adapter on those adds its part after any hook, and it would stay
unrotated. Nothing is remembered between modules but in a context variable that the attention function empties, so that
threads, copies and gradient checkpointing (which runs the hook again) just work.
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

PREFIX = "rotary_"  # of the attention functions that rotate, before the name of the kernel they call
PLACES = "rotary_places"  # keyword under which position_ids travel to attention modules that do not get them
KINDS = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class Rotation:
    """How a model rotates, shared by its attention modules, which hold it as ``rotation``.

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


@functools.lru_cache(maxsize=64)
def _frequencies(rotation: Rotation, device: torch.device) -> Tensor:
    """The frequencies on a device, made once: a copy for each layer would stop a GPU's queue."""
    with torch.inference_mode(False):
        return rotation.frequencies().to(device)


class Turn:
    """The rotation of one attention module in one forward.

    Args:
        rotation: how.
        places: positions of the new tokens, (batch or 1, length); None counts from the end of the cache.
    """

    def __init__(self, rotation: Rotation, places: Tensor | None):
        self.rotation, self.places, self.keys_done = rotation, places, False
        self._angles: tuple[Tensor, Tensor] | None = None

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


_TURN: ContextVar[tuple[int, Turn] | None] = ContextVar("hf_attnpatch_turn", default=None)


class Turning:
    """Forward pre-hook of a module that asks the registry for its attention: keys will be rotated, queries too.

    Args:
        roles: of the arguments of the module's forward.
        config: whose attention implementation the module asks for.
    """

    def __init__(self, roles: Roles, config: Any):
        self.roles, self.config = roles, config

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand over a cache that rotates; refuse where the attention function would not."""
        rotation = rotation_of(module)
        if rotation is None:
            return None
        found = self.config._attn_implementation
        if not found.startswith(PREFIX):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} knows nothing of this model's rotary "
                f"positions and would drop them; model.set_attn_implementation('{PREFIX}{found}') keeps them."
            )
        given = self.roles.bind(args, kwargs)
        turn, cache = Turn(rotation, taken_places(given)), given.get(words.CACHE)
        if cache is not None:
            given.put(words.CACHE, view(cache, turn.stored))
        _TURN.set((id(module), turn))
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


@functools.cache
def turning(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention function that rotates, and then does what ``kernel`` does: always the same."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if rotation_of(module) is not None:
            owner, turn = _TURN.get() or (0, None)
            _TURN.set(None)
            if turn is None or owner != id(module):
                raise AttnPatchError(f"{type(module).__name__}: attends without having been told its positions.")
            query, key = turn.both(query, key)
        return kernel(module, query, key, value, *args, **kwargs)

    return attention


def rotation_of(module: nn.Module) -> Rotation | None:
    """Return the rotation of an attention module that this package gave one, or None."""
    found = vars(module).get("rotation")
    return found if isinstance(found, Rotation) else None
