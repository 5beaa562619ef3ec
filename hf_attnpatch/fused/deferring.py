"""The hook by which an attention module that does not dispatch comes to attend by a fused kernel (:mod:`.deferred`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..backends import FUSED, register_fused
from ..configs import config_at
from ..edits import AddPreHook, Edit, SetAttention, SetAttribute
from ..errors import AttnPatchError
from ..functional.biased import Sight
from ..positions.modules import AlibiBias, NoBias, Still, alibi_of, bias_left_out
from ..positions.relative import relative_of
from ..positions.turning import PLACES, Rotation, Turn, rotation_of, taken_places
from ..sites import Site
from ..upstream import words
from ..upstream.caches import CacheView, Storing, own, update_of
from ..upstream.roles import Roles, roles_of
from .deferred import Distances, Keys, Values
from .sight import read_sight


def variants(model: PreTrainedModel, anatomy: Anatomy) -> list[tuple[Edit, ...]] | str:
    """Return ways to try, best first, of giving a model that does not dispatch a fused kernel; or why there is none.

    They differ in whether the bias that a module is given counts, or is in the mask already.
    """
    sites = _own(anatomy)
    if not sites or anatomy.unread or anatomy.other:
        left = next(iter({**anatomy.other, **anatomy.unread}.items()), ("", "no attention module was read"))
        return f"{left[0] or anatomy.architecture}: {left[1]}"
    for site in sites:
        roles = roles_of(model.get_submodule(site.path))
        if site.dispatches or site.cross or not roles.takes(words.STATES, words.CACHE):
            return f"{site.path}: {site.kind} is no self-attention with a cache that computes its scores by itself"
    biased = (False, True) if roles_of(model.get_submodule(sites[0].path)).takes(words.BIAS) else (False,)
    return [(*_hooks(model, anatomy, bias), SetAttention("", FUSED, register_fused, True)) for bias in biased]


def rebiased(model: PreTrainedModel, anatomy: Anatomy, bias: AlibiBias) -> tuple[Edit, ...] | str:
    """Return the edits that give such a model another bias by distance than its own, or why that cannot be."""
    ways = variants(model, anatomy)
    if isinstance(ways, str):
        return ways
    return (*_held(anatomy, "alibi", bias), *_deferred(model, anatomy))


def unbiased(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...] | str:
    """Return the edits that leave such a model's own bias by distance out, or why that cannot be."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else (*_held(anatomy, "alibi", NoBias()), *_deferred(model, anatomy))


def deferred(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...] | str:
    """Return the edits that make such a model attend by a fused kernel, none if it does; or why that cannot be."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else tuple(_deferred(model, anatomy))


def rotated(model: PreTrainedModel, anatomy: Anatomy, rotation: Rotation) -> tuple[Edit, ...] | str:
    """Return the edits that make such a model rotate queries and keys, or why that cannot be."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else (*_held(anatomy, "rotation", rotation), *_deferred(model, anatomy))


def _own(anatomy: Anatomy) -> list[Site]:
    """The language model's attention modules; not those of an image or audio tower."""
    return [site for site in anatomy.sites if not site.tower]


def _held(anatomy: Anatomy, name: str, value: object) -> Iterator[Edit]:
    return (SetAttribute(site.path, name, value) for site in _own(anatomy))


def _deferred(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Edit]:
    """Make attention go through a fused kernel, where it does not already."""
    first = model.get_submodule(_own(anatomy)[0].path)
    if not any(isinstance(hook, Deferring) for hook in first._forward_pre_hooks.values()):
        yield from _hooks(model, anatomy, False)
        yield SetAttention("", FUSED, register_fused, True)


def _hooks(model: PreTrainedModel, anatomy: Anatomy, unbiased: bool) -> Iterator[Edit]:
    config = config_at(model, _own(anatomy)[0].config)
    for site in _own(anatomy):
        hook = Deferring(roles_of(model.get_submodule(site.path)), config, FUSED, unbiased)
        yield AddPreHook(site.path, hook, "scores go to a fused kernel")


class DeferredCache:
    """What a module's cache does while it attends by a fused kernel: stores as it did, and hands back notes.

    Args:
        sight: what queries see of so many keys.
        bias: by distance.
        turn: the rotation of this forward, or None.
    """

    def __init__(self, sight: Callable[[int], Sight | None], bias: Distances, turn: Turn | None):
        self._sight, self._bias, self._turn = sight, bias, turn

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> tuple[Keys, Values]:
        """Store them where there is a cache, keys rotated where the module rotates."""
        if self._turn is not None:
            key = self._turn.keys(key, storing.past())
        key, value = storing.store(key, value)
        keys = Keys(key, key.to("meta"), self._sight(key.shape[2]), self._bias, self._turn)
        return keys, Values(value, value.to("meta"))


def deferred_view(value: Any) -> bool:
    """Whether an argument is a cache through which a module's scores go to a fused kernel."""
    return isinstance(getattr(update_of(value), "__self__", None), DeferredCache)


class Deferring:
    """Forward pre-hook of an attention module: it attends by a fused kernel from now on.

    Args:
        roles: of the arguments of the module's forward.
        config: whose attention implementation decides what masks look like.
        key: the implementation under which they are those of :mod:`.sight`.
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
        if not (mask is None or isinstance(mask, Tensor)):
            return args, dict(kwargs)  # of a memory, whose own hook comes next
        if ours and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            given.put(words.MASK, None)
        else:
            mask = None
        alibi = given.get(words.BIAS) if self.unbiased else None
        if isinstance(alibi, Tensor):
            given.put(words.BIAS, alibi.new_zeros(()).expand(alibi.shape))
        queries = given.get(words.STATES).shape[1]
        cache = own(given.get(words.CACHE))  # of a pair, where cross-attention has the other
        rotation, places = rotation_of(module), taken_places(given)
        turn = None if rotation is None else Turn(rotation, places)
        bias = relative_of(module) or (NoBias() if bias_left_out(module) else alibi_of(module))
        given.put(words.CACHE, CacheView(cache, DeferredCache(_Seen(mask, ours, queries), bias, turn).stored))
        return given.back()


class StillAngles(Still):
    """Forward pre-hook of an attention module that rotates by a table of its own: every token stands at position 0.

    Args:
        roles: of the arguments of the module's forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put zeros in the place of the positions, and keep those for a rotation of ours that has not run yet."""
        given = self.roles.bind(args, kwargs)
        places = given.get(words.POSITIONS)
        if rotation_of(module) is not None and not any(map(deferred_view, given.named.values())):
            given.named[PLACES] = places
        given.put(words.POSITIONS, torch.zeros_like(places))
        return given.back()


class _Seen:
    """What queries see of so many keys, where the mask is ours; None where the forward adds its own."""

    def __init__(self, mask: Tensor | None, ours: bool, queries: int):  # no dataclass: torch.compile cannot build one
        self.mask, self.ours, self.queries = mask, ours, queries

    def __call__(self, keys: int) -> Sight | None:
        return read_sight(self.mask, True, self.queries, keys) if self.ours else None
