"""The hook by which an attention module that does not dispatch comes to attend by a fused kernel (:mod:`.deferred`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import Anatomy
from .backends import FUSED, register_fused
from .configs import config_at
from .deferred import Keys, Values
from .edits import AddPreHook, Edit, SetAttention, SetAttribute
from .errors import AttnPatchError
from .functional.biased import Sight
from .position_modules import AlibiBias, alibi_of
from .sight import read_sight

_CACHES = ("layer_past", "past_key_values", "past_key_value")
_BIASES = ("alibi", "position_bias")


def variants(model: PreTrainedModel, anatomy: Anatomy) -> list[tuple[Edit, ...]] | str:
    """Return ways to try, best first, of giving a model that does not dispatch a fused kernel; or why there is none.

    They differ in whether the bias that a module is given counts, or is in the mask already.
    """
    sites = [s for s in anatomy.sites if not s.tower]
    if not sites or anatomy.unread or anatomy.other:
        left = next(iter({**anatomy.other, **anatomy.unread}.items()), ("", "no attention module was read"))
        return f"{left[0] or anatomy.architecture}: {left[1]}"
    for site in sites:
        names = _names(model.get_submodule(site.path))
        if site.dispatches or site.cross or "hidden_states" not in names or not set(_CACHES) & set(names):
            return f"{site.path}: {site.kind} is no self-attention with a cache that computes its scores by itself"
    biases = set(_BIASES) & set(_names(model.get_submodule(sites[0].path)))
    return [(*_hooks(model, anatomy, bias), SetAttention("", FUSED, register_fused, True)) for bias in (None, *biases)]


def rebiased(model: PreTrainedModel, anatomy: Anatomy, bias: AlibiBias) -> tuple[Edit, ...] | str:
    """Return the edits that give such a model another bias by distance than its own, or why that cannot be."""
    ways = variants(model, anatomy)
    if isinstance(ways, str):
        return ways
    held = [SetAttribute(site.path, "alibi", bias) for site in anatomy.sites]
    return (*held, *_hooks(model, anatomy, None), SetAttention("", FUSED, register_fused, True))


def _hooks(model: PreTrainedModel, anatomy: Anatomy, unbiased: str | None) -> Iterator[Edit]:
    config = config_at(model, anatomy.sites[0].config)
    for site in anatomy.sites:
        names = _names(model.get_submodule(site.path))
        cache = next(name for name in _CACHES if name in names)
        yield AddPreHook(site.path, Deferring(names, cache, config, FUSED, unbiased), "scores go to a fused kernel")


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


class DeferredCache:
    """What the attention module takes for its cache: stores as the cache does, and hands back notes."""

    def __init__(self, cache: Any, sight: Callable[[int], Sight | None], bias: AlibiBias | None):
        self._cache, self._sight, self._bias = cache, sight, bias

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        """Store them where there is a cache."""
        if self._cache is not None:
            key, value = self._cache.update(key, value, *args, **kwargs)
        return Keys(key, key.to("meta"), self._sight(key.shape[2]), self._bias), Values(value, value.to("meta"))

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
        if named.get("output_attentions"):
            raise AttnPatchError(
                f"{type(module).__name__}: a fused kernel computes no attention weights; call without "
                "output_attentions, or revert the flash patch."
            )
        mask, ours = named.get("attention_mask"), self.config._attn_implementation == self.key
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
        named[self.cache] = DeferredCache(cache, _Seen(mask, ours, queries), alibi_of(module))
        return (), named


@dataclass(frozen=True)
class _Seen:
    """What queries see of so many keys, where the mask is ours; None where the forward adds its own."""

    mask: Tensor | None
    ours: bool
    queries: int

    def __call__(self, keys: int) -> Sight | None:
        return read_sight(self.mask, True, self.queries, keys) if self.ours else None
