"""A memory for attention modules that compute their scores by themselves (BLOOM, MPT, GPT-J): it comes as their cache.

What is one plain segment runs as it did, and the cache only notes what is to be remembered. In longer calls scores go
to torch's kernel (:mod:`..attention.deferring`), around which the module's wrappers run as around any other.
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
from ..upstream.roles import Roles
from .attention import met, recurrent_of
from .call import no_weights
from .forms import corner

MASKS_UNDER_EAGER = PREFIX + "eager"  # by which such a model asks for masks while it computes plain segments itself


class DeferWithMemory(DeferAttention):
    """Forward pre-hook of an attention module: it computes what is one plain segment itself, and the rest is fused.

    Args:
        roles: of the arguments of the module's forward.
        config: whose attention implementation decides what masks look like.
    """

    def __init__(self, roles: Roles, config: Any):
        super().__init__(roles, config, MASKS_UNDER_EAGER, False)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that notes what is new, or one that knows what was before."""
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
    """What a module's cache does while somebody is told of what it stores.

    Args:
        told: of new keys and values, each (batch, kv heads, new, d).
    """

    def __init__(self, told: Callable[[Tensor, Tensor], None]):
        self._told = told

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> Any:
        """Tell, and do what the cache does."""
        self._told(key, value)
        return storing.store(key, value)


class ObserveKeys:
    """Forward pre-hook of an attention module: somebody is told of its keys and values while a model is read.

    Args:
        roles: of the arguments of the module's forward.
        told: see :class:`StoreObserver`.
    """

    def __init__(self, roles: Roles, told: Callable[[Tensor, Tensor], None]):
        self.roles, self.told = roles, told

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that tells."""
        given = self.roles.bind(args, kwargs)
        given.put(words.CACHE, CacheView(given.get(words.CACHE), StoreObserver(self.told).stored))
        return given.back()


def window_of(module: nn.Module) -> str | None:
    """Return the buffer by which a module hides more than what comes later (GPT-Neo's local layers), or None."""
    for name, buffer in module.named_buffers(recurse=False):
        square = buffer.dtype == torch.bool and buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2]
        if square and not buffer.is_meta and not bool((buffer == corner(*buffer.shape[-2:]).to(buffer.device)).all()):
            return name
    return None
