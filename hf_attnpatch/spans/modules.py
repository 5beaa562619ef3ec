"""Modules of attention sinks: a hook on each attention module, and a cache layer that evicts tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..attention.masks import mask_of
from ..errors import AttnPatchError
from ..functional.spans import Sinks
from ..upstream import words
from ..upstream.caches import DynamicLayer, Storing, length, overriding, queries, view
from ..upstream.roles import ArgumentHook, Arguments, Roles


class ShiftedAngles(ArgumentHook):
    """Forward pre-hook of a rotary module: gives every token the same position.

    Args:
        roles: argument roles of its forward.
        place: that position.
    """

    def __init__(self, roles: Roles, place: int):
        super().__init__(roles)
        self.place = place

    def edit(self, module: nn.Module, given: Arguments) -> None:
        """Replace the positions."""
        given.put(words.POSITIONS, torch.full_like(given.get(words.POSITIONS), self.place))


@overriding("AttentionSinks", "get_mask_sizes", "crop", of_layer=True)
class SinkLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed
    """A cache layer that keeps the first and the last tokens, and evicts those between them.

    Keys stay as the model rotated them; attention rotates the first ones to their new distance each time.

    Args:
        head: number of first tokens that stay: the sinks, and the longest padding before them.
        window: number of last tokens that a query sees, itself included.
    """

    def __init__(self, head: int, window: int):
        super().__init__()
        self.head, self.window, self.cumulative_length = head, window, 0

    def begin(self, head: int) -> None:
        """Set how many first tokens stay; rows that were only padding so far may have raised it."""
        if self.cumulative_length == 0 or self.keys.shape[-2] == self.cumulative_length:
            self.head = head

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what the new queries see, and store what the next one will."""
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
        """Return the number of keys, and the column after which evicted ones are missing (0: none are)."""
        held = 0 if not self.is_initialized else int(self.keys.shape[-2])
        return held + queries(query_length), self.head if held < self.cumulative_length else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Raises:
            AttnPatchError: tokens before them were evicted already.
        """
        if self.is_initialized and self.keys.shape[-2] < self.cumulative_length:
            if not tokens_to_remove:
                return  # asked where assisted decoding kept every draft, and after each step on mps
            raise AttnPatchError(
                "this cache keeps attention sinks and a window, and has evicted tokens that a rollback needs "
                "(assisted decoding?); decode without it, or pass a cache of your own."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = 0 if self.keys is None else int(self.keys.shape[-2])


class EvictHook(ArgumentHook):
    """Forward pre-hook of an attention module: makes an empty dynamic cache evict tokens.

    Args:
        roles: argument roles of the module's forward.
        span: how many tokens are kept.
    """

    def __init__(self, roles: Roles, span: Sinks):
        super().__init__(roles)
        self.span = span

    def edit(self, module: nn.Module, given: Arguments) -> bool | None:
        """Pass a view of the cache, which replaces the layer when the first keys arrive."""
        cache = given.get(words.CACHE)
        if type(cache) is not DynamicCache:
            return False
        head = self.span.sinks + _padding(given.get(words.MASK))
        given.put(words.CACHE, view(cache, EvictingStore(head, self.span.window).stored))
        return None


class EvictingStore:
    """Stores keys of one module in a cache; an empty layer is replaced by one that evicts.

    Args:
        head: number of first tokens that stay.
        window: number of last tokens that a query sees.
    """

    def __init__(self, head: int, window: int):
        self.head, self.window = head, window

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Replace the layer if it is empty, and store."""
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
    """Checks that the layers of a cache evict tokens.

    Args:
        layers: number of attention modules with sinks and a window.
    """

    def __init__(self, layers: int):
        self.layers = layers

    def __call__(self, cache: Any) -> str | None:
        """Return what is wrong with a cache after decoding a text, or None."""
        found = sum(isinstance(layer, SinkLayer) for layer in getattr(cache, "layers", ()))
        if found >= self.layers:  # more if modules run several times in a forward, each time with its own layer
            return None
        return f"the cache would keep every token: {found} of {self.layers} layers evict those outside the window"


def _padding(mask: Any) -> int:
    """Return the largest number of padding tokens before a row."""
    made = mask_of(mask)
    places = None if made is None else made.positions()
    if made is None or places is None:
        return 0
    return made.once("padding before a row", lambda: int((places < 0).sum(-1).max()))
