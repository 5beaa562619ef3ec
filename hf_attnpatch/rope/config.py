"""The config fields that a rope scaling sets, computed from a config and its rotary module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy
from ..configs import config_at
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..upstream import words
from ..upstream.find import changed
from ..upstream.roles import frequencies
from .fields import Scaling
from .parameters import Window, scaled, untruncated

_LOCAL = ("sliding", "local", "chunked")


def scaled_fields(
    want: Scaling, config: PretrainedConfig, module: nn.Module, window: int, compose: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields to set in one config, and notes for the user.

    Args:
        want: kind and factor.
        config: the config that built the rotary module.
        module: the rotary module.
        window: context in tokens that it serves at present.
        compose: write a static kind as ``longrope`` even if its own name would do.

    Raises:
        AttnPatchError: the present scaling and the wanted one do not multiply.
    """
    old: Mapping[str, Any] = config.rope_parameters
    nested = [key for key, value in old.items() if isinstance(value, Mapping)]
    chosen, new = _chosen(want, nested), dict(old)
    rest = ", ".join(k for k in nested if k not in chosen) or "nothing"
    notes = [f"scales {', '.join(chosen)}; {rest} left alone"] if nested else []
    for key in chosen or [""]:
        before = old[key] if key else old
        now = window_of(module, window, key)
        after = scaled(want, before, now, compose)
        if key and after["rope_type"] == "yarn" and after.get("truncate") is False:
            after = untruncated(after, 2 * len(now.frequencies))
            notes.append("written as longrope: transformers drops truncate where parameters are nested")
        if before.get("rope_type", "default") not in ("default", after["rope_type"]):
            notes.append(f"{before['rope_type']} times {want.kind}, written as {after['rope_type']}")
        new = {**new, key: after} if key else after
    fields: dict[str, Any] = {"rope_parameters": new}
    if want.kind == "dynamic":  # transformers measures its growth against max_position_embeddings
        notes.append(
            "transformers recomputes dynamic angles as the text grows: cached keys keep their old ones; "
            "per_request=True keeps one factor for a whole request"
        )
        return fields, notes
    fields["max_position_embeddings"] = round(window * want.factor)
    if getattr(config, "original_max_position_embeddings", None) is not None:  # Phi-3: outside, with priority
        fields["original_max_position_embeddings"] = new.get("original_max_position_embeddings", window)
    return fields, notes


def declared_window(config: PretrainedConfig) -> int:
    """Return the context that a config declares, in tokens.

    Raises:
        UnsupportedArchitecture: it declares none.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise UnsupportedArchitecture(
            f"{type(config).__name__}: max_position_embeddings is {length!r}; a factor needs a length to multiply."
        )
    return length


def head_dim(model: PreTrainedModel, anatomy: Anatomy, path: str) -> dict[str, int]:
    """Return the head size if the config leaves it open, for transformers' formulas; modules derive it themselves."""
    config, sites = config_at(model, path), [s for s in anatomy.sites if s.config == path]
    return {"head_dim": sites[0].head_dim} if sites and vars(config).get("head_dim", 0) is None else {}


def _chosen(want: Scaling, nested: list[str]) -> list[str]:
    if want.layer_types is None:
        return [key for key in nested if not any(word in key for word in _LOCAL)] or nested
    unknown = [key for key in want.layer_types if key not in nested]
    if unknown:
        there = ", ".join(nested) or "none"
        raise AttnPatchError(f"layer type {unknown[0]!r} has no rotary parameters of its own; there are: {there}.")
    return list(want.layer_types)


def window_of(module: nn.Module, length: int, key: str = "") -> Window:
    """Return what a rotary module does now.

    Args:
        module: computes the angles.
        length: context in tokens that it serves.
        key: a layer type, where parameters are nested.
    """
    return Window(length, _frequencies(module, key), _attention_scaling(module, key))


def _frequencies(module: nn.Module, layer_type: str) -> Tensor:
    """Return the present frequencies in fp32; of those that switch by length, the original window's."""
    prefix, held = f"{layer_type}_" if layer_type else "", frequencies(module)
    mine = {name.removeprefix(prefix): b for name, b in held.items() if name.startswith(prefix)}
    other = next((b for name, b in mine.items() if "original" not in name), None)
    found = mine.get(words.ORIGINAL_FREQUENCIES, mine.get(words.FREQUENCIES, other))
    if found is None:
        raise changed(f"no buffer of frequencies in {type(module).__name__}", "RopeScaling")
    return found.detach().to("cpu", torch.float32)


def _attention_scaling(module: nn.Module, layer_type: str) -> float:
    name = f"{layer_type}_attention_scaling" if layer_type else "attention_scaling"
    return float(getattr(module, name, 1.0))
