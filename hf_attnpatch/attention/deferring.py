"""The hook by which an attention module that does not dispatch comes to attend by a fused kernel (:mod:`.deferred`)."""

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

_PUBLISHED = AlibiBias(None, None, True, 1.0)  # of families that are handed a bias, where it reaches over a memory


class DeferredCache:
    """What a module's cache does while it attends by a fused kernel: stores as it did, and hands back notes.

    Args:
        module: whose cache it is.
        sight: what queries see of so many keys.
        term: added to the scores in the place of the forward's own bias; None keeps that.
        turn: the rotation of this forward, or None.
        handed: by a memory in the place of a mask, or None.
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
        """Store them where there is a cache, keys rotated where the module rotates."""
        if self._turn is not None:
            key = self._turn.keys(key, storing.past())
        key, value = storing.store(key, value)
        sight = self._sight(key.shape[2])
        keys = Keys(key, key.to("meta"), self._module, sight, self._term, self._turn, self._handed)
        return keys, Values(value, value.to("meta"))


def deferred_view(value: Any) -> bool:
    """Whether an argument is a cache through which a module's scores go to a fused kernel."""
    return isinstance(getattr(update_of(value), "__self__", None), DeferredCache)


class DeferAttention:
    """Forward pre-hook of an attention module: it attends by a fused kernel from now on.

    Args:
        roles: of the arguments of the module's forward.
        config: whose attention implementation decides what masks look like.
        key: the implementation under which they are those of :mod:`.masks`.
        unbiased: whether the bias by distance that the module is given is in the mask already.
    """

    def __init__(self, roles: Roles, config: Any, key: str, unbiased: bool):
        self.roles, self.config, self.key, self.unbiased = roles, config, key, unbiased

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that takes notes, and keep the mask."""
        given = self.roles.bind(args, kwargs)
        if deferred_view(given.get(words.CACHE)):
            return args, dict(kwargs)  # a recorded call that is run again: all is in it
        if given.get(words.WEIGHTS):
            raise AttnPatchError(
                f"{type(module).__name__}: a fused kernel computes no attention weights; call without "
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
        cache = own(given.get(words.CACHE))  # of a pair, where cross-attention has the other
        turn = _turn(module, taken_places(given))
        given.put(words.CACHE, CacheView(cache, DeferredCache(module, seen, term, turn, handed).stored))
        return given.back()

    def _recalled(
        self, module: nn.Module, given: Arguments, handed: MemoryMask
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache of the new tokens alone: what they see of a memory, its wrapper knows."""
        bias, columns = given.get(words.BIAS), given.get(words.STATES).shape[1]
        term: Term = _PUBLISHED if bias is not None and not bias_left_out(module) else OwnBias(None)
        taken_places(given)
        turn = _turn(module, handed.call.places(given.get(words.STATES)))
        view = DeferredCache(module, _before, wrapper_of(module, Term) or term, turn, handed)  # type: ignore[type-abstract]
        given.put(words.MASK, None)
        given.put(words.CACHE, CacheView(None, view.stored))
        if isinstance(bias, Tensor):  # of the new tokens alone, where it does not end with a table
            given.put(words.BIAS, bias.new_zeros(()).expand(*bias.shape[:-1], columns))
        return given.back()


def _turn(module: nn.Module, places: Tensor | None) -> KeyRotation | None:
    rotation = rotation_of(module)
    return None if rotation is None else KeyRotation(rotation, places)


def _before(_: int) -> Sight:
    """What queries see until the wrapper of a memory says more: what is before them."""
    return Sight(True)


class _Seen:
    """What queries see of so many keys, where the mask is ours; None where the forward adds its own."""

    def __init__(self, mask: Tensor | None, ours: bool, queries: int):  # no dataclass: torch.compile cannot build one
        self.mask, self.ours, self.queries = mask, ours, queries

    def __call__(self, keys: int) -> Sight | None:
        if not self.ours:
            return None
        return replace(read_sight(self.mask, True, self.queries, keys), made=mask_of(self.mask))
