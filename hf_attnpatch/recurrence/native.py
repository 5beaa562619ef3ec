"""Segment memory for attention modules that compute their own scores (BLOOM, MPT, GPT-J).

A plain segment runs as before, and the cache only records what the memory needs. For longer calls, scores are deferred
to torch's kernel (:mod:`..attention.deferring`), with the module's wrappers around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.deferring import DeferAttention
from ..attention.registry import PREFIX
from ..upstream import words
from ..upstream.caches import CacheView, Storing
from ..upstream.roles import ArgumentHook, Arguments, Roles
from .attention import met, recurrent_of
from .call import no_weights
from .forms import corner

MASKS_UNDER_EAGER = PREFIX + "eager"  # selects the masks while such a model computes plain segments itself


class DeferWithMemory(DeferAttention):
    """Forward pre-hook of an attention module: it computes plain segments itself and defers longer calls.

    Args:
        roles: argument roles of the module's forward.
        config: the config whose attention implementation determines the form of the masks.
    """

    def __init__(self, roles: Roles, config: Any):
        super().__init__(roles, config, MASKS_UNDER_EAGER, False)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass a cache that records what is new, or one that defers attention."""
        given = self.roles.bind(args, kwargs)
        handed, found = met(module, given.get(words.MASK)), recurrent_of(module)
        assert found is not None
        if not handed.call.plain:
            if given.get(words.WEIGHTS):
                raise no_weights(module)
            return super().__call__(module, args, kwargs)
        given.put(words.MASK, handed.own)
        noting = StoreObserver(functools.partial(handed.call.write, found.number))
        given.put(words.CACHE, CacheView(given.get(words.CACHE), noting.stored))
        return given.back()


class StoreObserver:
    """Reports the keys and values that a module stores in its cache.

    Args:
        told: called with new keys and values, each (batch, kv heads, new, d).
    """

    def __init__(self, told: Callable[[Tensor, Tensor], None]):
        self._told = told

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Report the states, and store them."""
        self._told(key, value)
        return storing.store(key, value)


class ObserveKeys(ArgumentHook):
    """Forward pre-hook of an attention module: reports its keys and values while a model is analysed.

    Args:
        roles: argument roles of the module's forward.
        told: see :class:`StoreObserver`.
    """

    def __init__(self, roles: Roles, told: Callable[[Tensor, Tensor], None]):
        super().__init__(roles)
        self.told = told

    def edit(self, module: nn.Module, given: Arguments) -> None:
        """Pass a cache that reports."""
        given.put(words.CACHE, CacheView(given.get(words.CACHE), StoreObserver(self.told).stored))


def window_of(module: nn.Module) -> str | None:
    """Return the buffer by which a module masks more than the future (GPT-Neo's local layers), or None."""
    for name, buffer in module.named_buffers(recurse=False):
        square = buffer.dtype == torch.bool and buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2]
        if square and not buffer.is_meta and not bool((buffer == corner(*buffer.shape[-2:]).to(buffer.device)).all()):
            return name
    return None
