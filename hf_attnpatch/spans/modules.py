"""What stays inside a model whose attention sees distances otherwise: plain objects, hooks, and a cache layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import AttnPatchError
from ..functional.rerotation import Turning
from ..functional.spans import Sinks, Span

PREFIX = "spans_"  # of the attention functions that know of spans, before the name of the kernel they call
_CACHES = ("past_key_values", "past_key_value", "layer_past")


class Spanned:
    """How one attention module sees distances; the module holds it as ``span``.

    Not a module and no buffer: everything follows from the config, and the frequencies are read where the model keeps
    them, so that they follow it to another device and are there when it was built on the meta device.

    Args:
        span: distances.
        rotary: the module that made the angles.
        buffer: under which name it keeps its frequencies.
        interleaved: see :class:`Turning`.
        first: see :class:`Turning`.
    """

    def __init__(self, span: Span, rotary: nn.Module, buffer: str, interleaved: bool, first: int):
        self.span, self.rotary, self.buffer, self.interleaved, self.first = span, rotary, buffer, interleaved, first

    def __repr__(self) -> str:
        return str(self.span)

    def turning(self) -> Turning:
        """Return how the module's states turn."""
        return Turning(getattr(self.rotary, self.buffer), self.interleaved, self.first)


class Listener:
    """In the place of :class:`Spanned` while a model is being read: notes what attention is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Mapping[str, Any]]] = []


class SpanGuard:
    """Forward pre-hook: stops a model whose attention function was exchanged for one that knows nothing of its span.

    Args:
        config: whose attention implementation the module asks for.
    """

    def __init__(self, config: Any):
        self.config = config

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look, and change nothing."""
        found = self.config._attn_implementation
        if not found.startswith(PREFIX):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} knows nothing of the distances that this "
                f"model was patched to see; model.set_attn_implementation('{PREFIX}sdpa') keeps them, or "
                f"'{PREFIX}eager', which is dense."
            )


class ShiftedAngles:
    """Forward pre-hook of a rotary module: every token stands at one position.

    Args:
        index: place of ``position_ids`` among the positional arguments.
        place: the position.
    """

    def __init__(self, index: int, place: int):
        self.index, self.place = index, place

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put it in the place of the positions."""
        named, rest = dict(kwargs), list(args)
        if "position_ids" in named:
            named["position_ids"] = torch.full_like(named["position_ids"], self.place)
        else:
            rest[self.index] = torch.full_like(rest[self.index], self.place)
        return tuple(rest), named


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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the queries get, and behind how many of them others are missing (0: nowhere)."""
        held = 0 if not self.is_initialized else int(self.keys.shape[-2])
        return held + query_length, self.head if held < self.cumulative_length else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            AttnPatchError: tokens before them were let go already.
        """
        if self.is_initialized and self.keys.shape[-2] < self.cumulative_length and tokens_to_remove:
            raise AttnPatchError(
                "this cache keeps attention sinks and a window, and has let go of tokens that a rollback needs "
                "(assisted decoding?); decode without it, or pass a cache of your own as past_key_values."
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = 0 if self.keys is None else int(self.keys.shape[-2])


class Evicting:
    """Forward pre-hook of an attention module: a growing cache that is still empty becomes one that lets go.

    Args:
        names: of the parameters of the module's forward, in order.
        span: how much is kept.
        layer: the module's number in the cache.
    """

    def __init__(self, names: tuple[str, ...], span: Sinks, layer: int):
        self.names, self.span, self.layer = names, span, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the cache before the module does."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache: Any = next((named[name] for name in _CACHES if named.get(name) is not None), None)
        if type(cache) is not DynamicCache or len(cache.layers) < self.layer:
            return
        if len(cache.layers) == self.layer:
            cache.layers.append(DynamicLayer())
        found = cache.layers[self.layer]
        head = self.span.sinks + _padding(named.get("attention_mask"))
        if type(found) is DynamicLayer and found.get_seq_length() == 0:
            cache.layers[self.layer] = SinkLayer(head, self.span.window)
        elif isinstance(found, SinkLayer):
            found.begin(head)


def _padding(mask: Any) -> int:
    """Return the length of the longest padding before a row, from the mask of :mod:`hf_attnpatch.spans.attention`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64:
        return 0
    return int((mask[:, 0, 0] < 0).sum(-1).max())


def span_of(module: nn.Module) -> Spanned | Listener | None:
    """Return what this package gave an attention module, or None."""
    found = vars(module).get("span")
    return found if isinstance(found, (Spanned, Listener)) else None
