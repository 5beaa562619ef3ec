"""Edits that add rotation to attention, and edits that give rotary modules another base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import guarded, kernel_of, set_kernel
from ..attention.rotation import HandPlaces, RotateKeys, Rotation
from ..attention.wrapper import AddWrapper
from ..backends import FLAG
from ..configs import config_at
from ..edits import AddPreHook, Edit, ReplaceModule
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..few import on_few_layers
from ..modules.added import CountedOnly
from ..probe import default_inputs, logits_under, tokens_of
from ..sites import Place, dispatching, in_tower
from ..twin import Change, difference
from ..upstream import words
from ..upstream.roles import frequencies, roles_of
from .fusing import rotated
from .removal import ROTATION, check_followed, removal

_LOCAL = ("sliding", "local", "chunked")
Parameters = Callable[[Mapping[str, Any], int | None], dict[str, Any]]


def attention_rotated(model: PreTrainedModel, anatomy: Anatomy, rotation: Rotation, counted: bool) -> tuple[Edit, ...]:
    """Return the edits that make attention rotate queries and keys and remove all other positions.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        rotation: frequencies and layout.
        counted: whether passed positions do not reach attention, so that positions can only be counted.

    Raises:
        UnsupportedArchitecture: attention cannot be reached.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: reads two sequences; which is to be rotated is not known."
        )
    away = removal(model, anatomy, own=ROTATION)
    if anatomy.native:
        found = rotated(model, anatomy, rotation)
        if isinstance(found, str):
            raise UnsupportedArchitecture(
                f"{anatomy.sites[0].path}: {anatomy.sites[0].kind} computes its scores by itself and dispatches to no "
                f"attention function, and cannot be followed: {found}."
            )
        return _once((*found, *away, *_told(model, anatomy, counted)))
    places = dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
    unknown = next((place.path for place in places if place.num_heads is None), None)
    if unknown is not None:
        raise UnsupportedArchitecture(f"{unknown}: {(anatomy.other | anatomy.unread)[unknown]}")  # type: ignore[operator]
    return (*away, *_asked(model, anatomy, places, rotation), *_told(model, anatomy, counted))


def _asked(model: PreTrainedModel, anatomy: Anatomy, places: list[Place], rotation: Rotation) -> Iterator[Edit]:
    """Yield the hooks, the rotation and the kernel for modules that dispatch their attention."""
    for place in places:
        yield AddWrapper(place.path, rotation)
        module = model.get_submodule(place.path)
        if not _has(module, RotateKeys):
            yield AddPreHook(place.path, RotateKeys(roles_of(module)), "rotates keys on their way into the cache")
    kernel = kernel_of(model.config._attn_implementation)
    if kernel not in ("eager", *FLAG):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: attends by {kernel!r}, before which nothing can be rotated; "
            "model.set_attn_implementation('sdpa') first."
        )
    yield from guarded(model, anatomy.base, [(place.path, place.config) for place in places])
    yield set_kernel(kernel)


def _told(model: PreTrainedModel, anatomy: Anatomy, counted: bool) -> Iterator[Edit]:
    """Yield the hook that passes positions to attention, or refuses those that cannot be passed."""
    if anatomy.base is None:
        return
    base = model.get_submodule(anatomy.base)
    roles = roles_of(base)
    if counted and not _has(base, CountedOnly):
        yield AddPreHook(anatomy.base, CountedOnly(roles), "refuses positions that attention would not get")
    elif not counted and not _has(base, HandPlaces) and roles.takes(words.POSITIONS) and roles.open:
        yield AddPreHook(anatomy.base, HandPlaces(roles), "hands positions to attention")


def ignores_positions(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit]) -> bool:
    """Return whether passed positions do not reach attention under these edits.

    Raises:
        UnsupportedArchitecture: attention cannot be followed.
    """
    check_followed(model, anatomy, edits)
    top = roles_of(model)
    if anatomy.base is None or not (
        top.takes(words.POSITIONS) and roles_of(model.get_submodule(anatomy.base)).takes(words.POSITIONS)
    ):
        return False
    ids = tokens_of(model, default_inputs(model))
    told = {words.TOKENS: ids, words.MASK: torch.ones_like(ids)}  # without a mask, gaps would mean packed documents
    far = 3 * torch.arange(ids.shape[1], device=ids.device).expand_as(ids)

    def ask(cut: tuple[Edit, ...]) -> bool:
        gapped = logits_under(model, (*edits, *cut), top.call(**told, **{words.POSITIONS: far}))
        return torch.equal(gapped, logits_under(model, (*edits, *cut), top.call(**told)))

    return on_few_layers(model, anatomy.attending, ask)


def rebased(
    model: PreTrainedModel,
    anatomy: Anatomy,
    parameters: Parameters,
    layer_types: tuple[str, ...] | None,
    partial: float | None,
) -> tuple[list[Edit], list[str]]:
    """Return the edits that rebuild rotary modules from other parameters, with notes; none if nothing changes.

    Args:
        model: with rotary modules built from its config; those fixed at position 0 are restored.
        anatomy: the model's anatomy.
        parameters: maps the old ``rope_parameters`` and the declared length to the new ones.
        layer_types: which to change, where parameters are nested; None takes those that are not local.
        partial: the requested share, which must be the model's own.

    Raises:
        UnsupportedArchitecture: a rotary module is not built from ``config.rope_parameters``.
        AttnPatchError: an unknown layer type, another share, or parameters that the family refuses.
    """
    owners, notes, changes = _owners(model, anatomy), list[str](), list[Change]()
    for path in owners:
        said, wanted = _wanted(config_at(model, path), path, parameters, layer_types, partial)
        notes, changes = [*notes, *said], [*changes, *wanted]
    paths = [path for group in owners.values() for path in group]
    if not changes and not anatomy.stilled and not any(_stale(model.get_submodule(path)) for path in paths):
        return [], notes
    found = difference(model, changes)
    if isinstance(found, str):
        raise AttnPatchError(f"{anatomy.architecture}: {found}.")
    edits = found.edits(changes, paths, anatomy.architecture)
    return [*edits, *(ReplaceModule(path, _rebuilt, "rope, built again") for path in paths)], notes


def _wanted(
    config: PretrainedConfig,
    path: str,
    parameters: Parameters,
    layer_types: tuple[str, ...] | None,
    partial: float | None,
) -> tuple[list[str], list[Change]]:
    """Return notes on one config and its changes; arguments as for :func:`rebased`."""
    old, trained = config.rope_parameters, getattr(config, "max_position_embeddings", None)
    nested = [key for key, value in old.items() if isinstance(value, Mapping)]
    chosen = _chosen(nested, layer_types)
    _check_partial(config, [old[key] for key in chosen] or [old], partial)
    new = {**old, **{key: parameters(old[key], trained) for key in chosen}} if nested else parameters(old, trained)
    notes = [f"of {', '.join(chosen)}; other layer types left alone"] if len(chosen) < len(nested) else []
    notes += [f"{each['rope_type']} scaling replaced" for each in _scaled(old, chosen, new)]
    # Falcon with ALiBi has rotary modules that are not used
    changes = [Change(path, "alibi", False)] if getattr(config, "alibi", False) else []
    if not _same(new, old):
        changes.append(Change(path, "rope_parameters", new))
        factor = float(next((new[key] for key in chosen), new).get("factor", 1.0))
        if factor > 1 and trained:
            changes.append(Change(path, "max_position_embeddings", round(trained * factor)))
    return notes, changes


def _owners(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {}
    for rotary in (*anatomy.rotary, *anatomy.stilled):
        if in_tower(rotary.path):
            continue
        config = None if rotary.config is None else config_at(model, rotary.config)
        required = [
            p.name
            for p in list(inspect.signature(type(model.get_submodule(rotary.path)).__init__).parameters.values())[1:]
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if config is None or not getattr(config, "rope_parameters", None) or required != ["config"]:
            raise UnsupportedArchitecture(
                f"{rotary.path}: {rotary.kind} is not built from config.rope_parameters alone, so that its base cannot "
                "be changed where a checkpoint would keep it."
            )
        assert rotary.config is not None
        owners.setdefault(rotary.config, []).append(rotary.path)
    return owners


def _chosen(nested: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    unknown = [key for key in wanted or () if key not in nested]
    if unknown:
        there = ", ".join(nested) or "none"
        raise AttnPatchError(f"layer type {unknown[0]!r} has no rotary parameters of its own; there are: {there}.")
    return list(wanted) if wanted else [key for key in nested if not any(w in key for w in _LOCAL)] or nested


def _check_partial(config: PretrainedConfig, rows: list[Mapping[str, Any]], wanted: float | None) -> None:
    for row in rows if wanted is not None else ():
        own = row.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        if own != wanted:
            raise AttnPatchError(
                f"partial is {wanted}; the model's own modules rotate {own:g} of each head; leave None."
            )


def _scaled(old: Mapping[str, Any], chosen: list[str], new: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for before, after in [(old[key], new[key]) for key in chosen] or [(old, new)]:
        if before.get("rope_type", "default") not in ("default", after["rope_type"]):
            yield before


def _same(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Return whether the rows are equal; a missing type is the default one."""
    rows = [(new, old)] if not isinstance(next(iter(old.values())), Mapping) else [(new[k], old[k]) for k in old]
    return all({"rope_type": "default", **a} == {"rope_type": "default", **b} for a, b in rows)


def _stale(module: nn.Module) -> bool:
    """Return whether a rotary module disagrees with its config, which can be edited after a model is built."""
    wanted = frequencies(_rebuilt(module))
    return any(not torch.allclose(b.float(), wanted[name].float()) for name, b in frequencies(module).items())


def _rebuilt(old: nn.Module) -> nn.Module:
    """Rebuild the module from its config, which has been edited by now."""
    return type(old)(old.config).to(next(old.buffers()).device)


def _has(module: nn.Module, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in module._forward_pre_hooks.values())


def _once(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Drop edits that repeat an earlier one."""
    return tuple(
        {edit.claim: edit for edit in reversed(edits)}[claim] for claim in dict.fromkeys(e.claim for e in edits)
    )
