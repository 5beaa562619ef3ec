"""What attention sinks leave in a model: a hook on each module, and a cache layer that lets go of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..attention.masks import mask_of
from ..errors import AttnPatchError
from ..functional.spans import Sinks
from ..upstream import words
from ..upstream.caches import DynamicLayer, Storing, length, overriding, queries, view
from ..upstream.roles import Roles


class ShiftedAngles:
    """Forward pre-hook of a rotary module: every token stands at one position.

    Args:
        roles: of the arguments of its forward.
        place: the position.
    """

    def __init__(self, roles: Roles, place: int):
        self.roles, self.place = roles, place

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put it in the place of the positions."""
        given = self.roles.bind(args, kwargs)
        given.put(words.POSITIONS, torch.full_like(given.get(words.POSITIONS), self.place))
        return given.back()


@overriding("AttentionSinks", "get_mask_sizes", "crop", of_layer=True)
class SinkLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """A cache layer that keeps the first tokens and the last ones, and lets go of what is between them.

    Keys stay as the model turned them; attention turns the first ones to where they are seen, exactly, each time.

    Args:
        head: tokens that stay: the sinks, and the longest padding before them.
        window: last tokens that a query sees, itself among them.
    """

    def __init__(self, head: int, window: int):
        super().__init__()
        self.head, self.window, self.cumulative_length = head, window, 0

    def begin(self, head: int) -> None:
        """Keep so many first tokens: rows that were nothing but padding so far may have made it longer."""
        if self.cumulative_length == 0 or self.keys.shape[-2] == self.cumulative_length:
            self.head = head

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what the new queries may see; store what the next one may."""
        self.cumulative_length += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if keys.shape[-2] > self.head + self.window - 1:
            self.keys, self.values = (
                torch.cat([t[:, :, : self.head], t[:, :, -self.window + 1 :]], 2) for t in (keys, values)
            )
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self.cumulative_length)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return how many keys the queries get, and behind how many of them others are missing (0: nowhere)."""
        held = 0 if not self.is_initialized else int(self.keys.shape[-2])
        return held + queries(query_length), self.head if held < self.cumulative_length else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            AttnPatchError: tokens before them were let go already.
        """
        if self.is_initialized and self.keys.shape[-2] < self.cumulative_length and tokens_to_remove:
            raise AttnPatchError(
                "this cache keeps attention sinks and a window, and has let go of tokens that a rollback needs "
                "(assisted decoding?); decode without it, or pass a cache of your own."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = 0 if self.keys is None else int(self.keys.shape[-2])


class EvictHook:
    """Forward pre-hook of an attention module: a growing cache that is still empty becomes one that lets go.

    Args:
        roles: of the arguments of the module's forward.
        span: how much is kept.
    """

    def __init__(self, roles: Roles, span: Sinks):
        self.roles, self.span = roles, span

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand over a view of the cache, whose layer is exchanged when the first keys come."""
        given = self.roles.bind(args, kwargs)
        cache = given.get(words.CACHE)
        if type(cache) is not DynamicCache:
            return None
        head = self.span.sinks + _padding(given.get(words.MASK))
        given.put(words.CACHE, view(cache, EvictingStore(head, self.span.window).stored))
        return given.back()


class EvictingStore:
    """What a module's cache does when it stores: a layer that is still empty becomes one that lets go.

    Args:
        head: tokens that stay.
        window: last tokens that a query sees.
    """

    def __init__(self, head: int, window: int):
        self.head, self.window = head, window

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Exchange the layer, and store."""
        layers, number = storing.cache.layers, storing.layer
        if len(layers) == number:
            layers.append(DynamicLayer())
        found = layers[number] if number < len(layers) else None
        if type(found) is DynamicLayer and length(storing.cache, number) == 0:
            layers[number] = SinkLayer(self.head, self.window)
        elif isinstance(found, SinkLayer):
            found.begin(self.head)
        return storing.store(key, value)


class Evicts:
    """What attention sinks promise of a cache: so many of its layers let go of tokens.

    Args:
        layers: number of attention modules that see sinks and a window.
    """

    def __init__(self, layers: int):
        self.layers = layers

    def __call__(self, cache: Any) -> str | None:
        """Say what is wrong with a cache that a text was decoded with, or None."""
        found = sum(isinstance(layer, SinkLayer) for layer in getattr(cache, "layers", ()))
        if found >= self.layers:  # more where modules run several times a forward, each time with a layer of its own
            return None
        return f"the cache would keep every token: {found} of {self.layers} layers let go of those behind the window"


def _padding(mask: Any) -> int:
    """Return the length of the longest padding before a row."""
    made = mask_of(mask)
    places = None if made is None else made.positions()
    if made is None or places is None:
        return 0
    return made.once("padding before a row", lambda: int((places < 0).sum(-1).max()))
