"""The hook that makes an attention module which computes its own scores use a fused kernel (:mod:`.deferred`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..functional.biased import Sight
from ..upstream import words
from ..upstream.caches import CacheView, Storing, own, update_of
from ..upstream.roles import Arguments, Roles
from .alibi import AlibiBias, bias_left_out
from .deferred import Keys, Values
from .masks import MemoryMask, mask_of, read_sight
from .own_bias import OwnBias
from .rotation import KeyRotation, rotation_of, taken_places
from .wrapper import Term, wrapper_of

_PUBLISHED = AlibiBias(None, None, True, 1.0)  # for families whose bias is passed in, when a segment memory extends it


class DeferredCache:
    """Replaces a module's cache during one forward: stores keys and values as before and returns lazy ones.

    Args:
        module: the attention module.
        sight: maps a number of keys to which of them the queries see.
        term: added to the scores instead of the forward's own bias; None keeps that bias.
        turn: how queries and keys are rotated in this forward, or None.
        handed: the mask that a segment memory passes instead of the usual one, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        sight: Callable[[int], Sight | None],
        term: Term | None,
        turn: KeyRotation | None,
        handed: MemoryMask | None = None,
    ):
        self._module, self._sight, self._term, self._turn, self._handed = module, sight, term, turn, handed

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> tuple[Keys, Values]:
        """Store keys and values if there is a cache, with keys rotated where this package rotates them."""
        if self._turn is not None:
            key = self._turn.keys(key, storing.past())
        key, value = storing.store(key, value)
        sight = self._sight(key.shape[2])
        keys = Keys(key, key.to("meta"), self._module, sight, self._term, self._turn, self._handed)
        return keys, Values(value, value.to("meta"))


def deferred_view(value: Any) -> bool:
    """Return whether an argument is a cache that defers attention."""
    return isinstance(getattr(update_of(value), "__self__", None), DeferredCache)


class DeferAttention:
    """Forward pre-hook of an attention module that routes its attention through a fused kernel.

    Args:
        roles: argument roles of the module's forward.
        config: the config whose attention implementation determines the form of the masks.
        key: the implementation name under which masks come from :mod:`.masks`.
        unbiased: whether the mask that the module receives already contains its ALiBi bias.
    """

    def __init__(self, roles: Roles, config: Any, key: str, unbiased: bool):
        self.roles, self.config, self.key, self.unbiased = roles, config, key, unbiased

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass a cache that returns lazy states, and keep the mask."""
        given = self.roles.bind(args, kwargs)
        if deferred_view(given.get(words.CACHE)):
            return args, dict(kwargs)  # a recorded call is replayed; its arguments are complete
        if given.get(words.WEIGHTS):
            raise AttnPatchError(
                f"{type(module).__name__}: fused kernels return no attention weights; call without "
                "output_attentions, or revert the flash patch."
            )
        mask, ours = given.get(words.MASK), self.config._attn_implementation == self.key
        handed = mask if isinstance(mask, MemoryMask) else None
        if handed is not None and not handed.call.plain:
            return self._recalled(module, given, handed)
        if handed is not None:
            mask = handed.own
            given.put(words.MASK, mask)
        if ours and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            given.put(words.MASK, None)
        else:
            mask = None
        alibi = given.get(words.BIAS) if self.unbiased else None
        if isinstance(alibi, Tensor):
            given.put(words.BIAS, alibi.new_zeros(()).expand(alibi.shape))
        seen, term = _Seen(mask, ours, given.get(words.STATES).shape[1]), wrapper_of(module, Term)  # type: ignore[type-abstract]
        if term is None and bias_left_out(module):
            term = OwnBias(None)
        cache = own(given.get(words.CACHE))  # the self-attention half of an encoder-decoder cache
        turn = _turn(module, taken_places(given))
        given.put(words.CACHE, CacheView(cache, DeferredCache(module, seen, term, turn, handed).stored))
        return given.back()

    def _recalled(
        self, module: nn.Module, given: Arguments, handed: MemoryMask
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pass a cache of the new tokens only; the memory's wrapper knows what they see of earlier ones."""
        bias, columns = given.get(words.BIAS), given.get(words.STATES).shape[1]
        term: Term = _PUBLISHED if bias is not None and not bias_left_out(module) else OwnBias(None)
        taken_places(given)
        turn = _turn(module, handed.call.places(given.get(words.STATES)))
        view = DeferredCache(module, _before, wrapper_of(module, Term) or term, turn, handed)  # type: ignore[type-abstract]
        given.put(words.MASK, None)
        given.put(words.CACHE, CacheView(None, view.stored))
        if isinstance(bias, Tensor):  # for the new tokens only, unless the bias comes from a table
            given.put(words.BIAS, bias.new_zeros(()).expand(*bias.shape[:-1], columns))
        return given.back()


def _turn(module: nn.Module, places: Tensor | None) -> KeyRotation | None:
    rotation = rotation_of(module)
    return None if rotation is None else KeyRotation(rotation, places)


def _before(_: int) -> Sight:
    """Return a plain causal mask, until the memory's wrapper adds more."""
    return Sight(True)


class _Seen:
    """Which of the first ``keys`` keys the queries see, if the mask is ours; None where the forward adds its own."""

    def __init__(self, mask: Tensor | None, ours: bool, queries: int):  # no dataclass: torch.compile cannot build one
        self.mask, self.ours, self.queries = mask, ours, queries

    def __call__(self, keys: int) -> Sight | None:
        if not self.ours:
            return None
        return replace(read_sight(self.mask, True, self.queries, keys), made=mask_of(self.mask))
