"""Edits that route modules which compute their own scores through a fused kernel."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.alibi import AlibiBias, NoBias
from ..attention.deferring import DeferAttention
from ..attention.registry import FUSED, register
from ..attention.rotation import Rotation
from ..attention.wrapper import AddWrapper, Wrapper
from ..configs import config_at
from ..edits import AddPreHook, Edit, SetAttention
from ..sites import Site
from ..upstream import words
from ..upstream.roles import roles_of


def variants(model: PreTrainedModel, anatomy: Anatomy) -> list[tuple[Edit, ...]] | str:
    """Return variants, best first, of edits that give a model without dispatch a fused kernel; or why there are none.

    They differ in whether the bias that a module receives is added, or is contained in the mask already.
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
    return [(*_hooks(model, anatomy, bias), _masks(anatomy)) for bias in biased]


def rebiased(model: PreTrainedModel, anatomy: Anatomy, bias: AlibiBias) -> tuple[Edit, ...] | str:
    """Return the edits that replace such a model's own ALiBi bias, or the reason why that is impossible."""
    ways = variants(model, anatomy)
    if isinstance(ways, str):
        return ways
    return (*_held(anatomy, bias), *_deferred(model, anatomy))


def unbiased(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...] | str:
    """Return the edits that leave out such a model's own ALiBi bias, or the reason why that is impossible."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else (*_held(anatomy, NoBias()), *_deferred(model, anatomy))


def deferred(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...] | str:
    """Return the edits that make such a model use a fused kernel, none if it does; or why that is impossible."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else tuple(_deferred(model, anatomy))


def rotated(model: PreTrainedModel, anatomy: Anatomy, rotation: Rotation) -> tuple[Edit, ...] | str:
    """Return the edits that make such a model rotate queries and keys, or the reason why that is impossible."""
    ways = variants(model, anatomy)
    return ways if isinstance(ways, str) else (*_held(anatomy, rotation), *_deferred(model, anatomy))


def _own(anatomy: Anatomy) -> list[Site]:
    """Return the language model's attention modules, without those of an image or audio tower."""
    return [site for site in anatomy.sites if not site.tower]


def _held(anatomy: Anatomy, wrapper: Wrapper) -> Iterator[Edit]:
    return (AddWrapper(site.path, wrapper) for site in _own(anatomy))


def _deferred(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[Edit]:
    """Yield the edits that route attention through a fused kernel, where it is not yet."""
    first = model.get_submodule(_own(anatomy)[0].path)
    if not any(isinstance(hook, DeferAttention) for hook in first._forward_pre_hooks.values()):
        yield from _hooks(model, anatomy, False)
        yield _masks(anatomy)


def _masks(anatomy: Anatomy) -> Edit:
    """Return the edit that selects this package's masks in the language model's configs and the model's own config."""
    paths = ("", *(site.config for site in _own(anatomy)))
    return SetAttention("", FUSED, register, True, tuple(dict.fromkeys(paths)))


def _hooks(model: PreTrainedModel, anatomy: Anatomy, unbiased: bool) -> Iterator[Edit]:
    config = config_at(model, _own(anatomy)[0].config)
    for site in _own(anatomy):
        hook = DeferAttention(roles_of(model.get_submodule(site.path)), config, FUSED, unbiased)
        yield AddPreHook(site.path, hook, "scores go to a fused kernel")
