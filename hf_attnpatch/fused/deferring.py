"""The hook by which an attention module that does not dispatch comes to attend by a fused kernel (:mod:`.deferred`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from ..positions.turning import CACHES, PLACES, Rotation, Turn, rotation_of, taken_places
from ..sites import Site, names_of
from .deferred import Distances, Keys, Values
from .sight import read_sight

_BIASES = ("alibi", "position_bias")


def variants(model: PreTrainedModel, anatomy: Anatomy) -> list[tuple[Edit, ...]] | str:
    """Return ways to try, best first, of giving a model that does not dispatch a fused kernel; or why there is none.

    They differ in whether the bias that a module is given counts, or is in the mask already.
    """
    sites = _own(anatomy)
    if not sites or anatomy.unread or anatomy.other:
        left = next(iter({**anatomy.other, **anatomy.unread}.items()), ("", "no attention module was read"))
        return f"{left[0] or anatomy.architecture}: {left[1]}"
    for site in sites:
        names = names_of(model.get_submodule(site.path))
        if site.dispatches or site.cross or "hidden_states" not in names or not set(CACHES) & set(names):
            return f"{site.path}: {site.kind} is no self-attention with a cache that computes its scores by itself"
    biases = set(_BIASES) & set(names_of(model.get_submodule(sites[0].path)))
    return [(*_hooks(model, anatomy, bias), SetAttention("", FUSED, register_fused, True)) for bias in (None, *biases)]


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
        yield from _hooks(model, anatomy, None)
        yield SetAttention("", FUSED, register_fused, True)


def _hooks(model: PreTrainedModel, anatomy: Anatomy, unbiased: str | None) -> Iterator[Edit]:
    config = config_at(model, _own(anatomy)[0].config)
    for site in _own(anatomy):
        names = names_of(model.get_submodule(site.path))
        hook = Deferring(names, cache_name(names), config, FUSED, unbiased)
        yield AddPreHook(site.path, hook, "scores go to a fused kernel")


def cache_name(names: tuple[str, ...]) -> str:
    """Return the parameter that takes the cache."""
    return next(name for name in CACHES if name in names)


def bias_name(names: tuple[str, ...]) -> str | None:
    """Return the parameter that takes a bias by distance, or None."""
    return next((name for name in _BIASES if name in names), None)


class DeferredCache:
    """What the attention module takes for its cache: stores as the cache does, and hands back notes."""

    def __init__(self, cache: Any, sight: Callable[[int], Sight | None], bias: Distances, turn: Turn | None):
        self._cache, self._sight, self._bias, self._turn = cache, sight, bias, turn

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        """Store them where there is a cache, keys rotated where the module rotates."""
        if self._turn is not None:
            key = self._turn.keys(key, 0 if self._cache is None else self._cache.get_seq_length(*args[:1]))
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        keys = Keys(key, key.to("meta"), self._sight(key.shape[2]), self._bias, self._turn)
        return keys, Values(value, value.to("meta"))

    def get_seq_length(self, *args: Any) -> int:
        """As the cache; none has seen nothing."""
        return 0 if self._cache is None else self._cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Deferring:
    """Forward pre-hook of an attention module: it attends by a fused kernel from now on.

    Args:
        names: of the parameters of the module's forward, in order.
        cache: the one that takes the cache.
        config: whose attention implementation decides what masks look like.
        key: the implementation under which they are those of :mod:`.sight`.
        unbiased: the parameter whose bias is in the mask already, or None.
    """

    def __init__(self, names: tuple[str, ...], cache: str, config: Any, key: str, unbiased: str | None):
        self.names, self.cache, self.config, self.key, self.unbiased = names, cache, config, key, unbiased

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over a cache that takes notes, and keep the mask."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if isinstance(named.get(self.cache), DeferredCache):
            return args, dict(kwargs)  # a recorded call that is run again: all is in it
        if named.get("output_attentions"):
            raise AttnPatchError(
                f"{type(module).__name__}: a fused kernel computes no attention weights; call without "
                "output_attentions, or revert the flash patch."
            )
        mask, ours = named.get("attention_mask"), self.config._attn_implementation == self.key
        if not (mask is None or isinstance(mask, Tensor)):
            return args, dict(kwargs)  # of a memory, whose own hook comes next
        if ours and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            named["attention_mask"] = None
        else:
            mask = None
        alibi = named.get(self.unbiased) if self.unbiased else None
        if isinstance(alibi, Tensor):
            named[str(self.unbiased)] = alibi.new_zeros(()).expand(alibi.shape)
        queries = named["hidden_states"].shape[1]
        cache = named.get(self.cache)
        cache = getattr(cache, "self_attention_cache", cache)  # of a pair, where cross-attention has the other
        rotation, places = rotation_of(module), taken_places(named)
        turn = None if rotation is None else Turn(rotation, places)
        bias = relative_of(module) or (NoBias() if bias_left_out(module) else alibi_of(module))
        named[self.cache] = DeferredCache(cache, _Seen(mask, ours, queries), bias, turn)
        return (), named


class StillAngles(Still):
    """Forward pre-hook of an attention module that rotates by a table of its own: every token stands at position 0.

    Args:
        names: of the parameters of the module's forward, in order.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = names

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put zeros in the place of the positions, and keep those for a rotation of ours that has not run yet."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        later = not any(isinstance(value, DeferredCache) for value in named.values())
        if rotation_of(module) is not None and later:
            named[PLACES] = named["position_ids"]
        named["position_ids"] = torch.zeros_like(named["position_ids"])
        return (), named


@dataclass(frozen=True)
class _Seen:
    """What queries see of so many keys, where the mask is ours; None where the forward adds its own."""

    mask: Tensor | None
    ours: bool
    queries: int

    def __call__(self, keys: int) -> Sight | None:
        return read_sight(self.mask, True, self.queries, keys) if self.ours else None
