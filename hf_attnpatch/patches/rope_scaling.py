"""RoPE scaling of every kind that transformers computes itself, on top of whatever the checkpoint has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy
from ..configs import config_at
from ..edits import Edit, ReplaceModule, SetAttribute
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..patch import Patch, Proposal
from ..rope_fields import KINDS, STATIC, changes_something, check_belonging, check_number, checked_factors
from ..rope_parameters import Window, scaled, untruncated
from ..twin import Change, Difference, difference

_LOCAL = ("sliding", "local", "chunked")


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Patch):
    """Stretch the context of a rotary model by ``factor``.

    ``rope_theta`` and partial rotation are kept, and a scaling that is already there is multiplied, not replaced: one
    of the same kind gets the product of the factors, one of another (static) kind is composed frequency by frequency
    and written as ``longrope``, which stock transformers can express. Config and rotary modules change together.
    In models with rotary parameters per layer type only the layers that see the whole context are scaled.

    Args:
        kind: ``linear`` (2306.15595), ``ntk`` (another ``rope_theta``), ``ntk_by_parts`` (``yarn`` that leaves cos and
            sin alone), ``yarn`` (2309.00071), ``llama3``, ``longrope`` (2402.13753), ``dynamic`` (NTK by the length so
            far, as transformers computes it), ``resonance`` (2403.00071: wavelengths below the trained window rounded
            to whole tokens) or ``clipped`` (2602.05258: the lowest frequencies tapered to zero). The last two stretch
            nothing by themselves: put them on top of another kind.
        factor: new context over old, at least 1; 1 changes nothing, ``resonance`` and ``clipped`` excepted.
        beta_fast: for ``yarn``: turns within the old window above which a frequency is kept.
        beta_slow: for ``yarn``: turns below which it is interpolated.
        low_freq_factor: for ``llama3``: wavelengths above old / low are divided.
        high_freq_factor: for ``llama3``: wavelengths below old / high are kept.
        long_factor: for ``longrope``: one divisor for each rotated frequency beyond the old window; None takes YaRN's.
        short_factor: for ``longrope``: the same within it; None takes 1.
        attention_factor: for ``yarn`` and ``longrope``: factor on cos and sin; None takes the paper's.
        truncate: for ``yarn`` and ``ntk_by_parts``: whether the ramp begins and ends at whole frequencies.
        clip_frequencies: for ``clipped``: how many are tapered; None takes the paper's share, 20 of 64.
        layer_types: for models with nested parameters: which to scale; None takes those that are not local.

    Raises:
        UnsupportedArchitecture: no rotary module built from ``config.rope_parameters``.
        AttnPatchError: an unknown kind, a factor below 1, or a scaling that cannot be multiplied.
    """

    name: ClassVar[str] = "rope_scaling"

    kind: str
    factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    long_factor: tuple[float, ...] | None = None
    short_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None
    truncate: bool = True
    clip_frequencies: int | None = None
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AttnPatchError(f"kind {self.kind!r} does not exist; choose from: {', '.join(KINDS)}.")
        check_number("factor", self.factor, at_least=1)
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            check_number(name, getattr(self, name))
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if getattr(self, low) >= getattr(self, high):
                raise AttnPatchError(f"{low} {getattr(self, low)} must be below {high} {getattr(self, high)}.")
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor)
        check_belonging(self)
        for name in ("long_factor", "short_factor"):
            self._normalise(name, checked_factors(name, getattr(self, name), self.kind))
        if self.layer_types is not None:
            listed = isinstance(self.layer_types, Sequence) and not isinstance(self.layer_types, str)
            if not listed or not self.layer_types or not all(isinstance(each, str) for each in self.layer_types):
                raise AttnPatchError(f"layer_types is {self.layer_types!r}; give a list of names, or None.")
            self._normalise("layer_types", tuple(self.layer_types))

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which rotary modules would be rebuilt; see :meth:`Patch.propose`."""
        owners = self._owners(model, anatomy)
        if not changes_something(self):
            return Proposal((), (), ("a factor of 1 changes nothing",), preserves=True)
        changes, notes, found = self._tried(model, anatomy, owners)
        paths = [path for group in owners.values() for path in group]
        longer = [p for p in found.modules if p not in paths]
        if longer:
            raise UnsupportedArchitecture(
                f"{longer[0] or anatomy.architecture}: has tensors as long as the context, which this would not resize."
            )
        edits: list[Edit] = [change.edit() for change in changes]
        edits += [SetAttribute(*key, value) for key, value in found.attributes.items() if key[0] not in paths]
        edits += [ReplaceModule(path, _rebuild, f"rope: {self.kind}") for path in paths]
        return Proposal(tuple(edits), tuple(paths), tuple(notes), claims=("the positions",))

    def _tried(
        self, model: PreTrainedModel, anatomy: Anatomy, owners: Mapping[str, list[str]]
    ) -> tuple[list[Change], list[str], Difference]:
        """Return config changes that the family accepts, what to say about them, and what they change elsewhere."""
        refusals: list[str] = []
        for compose in (False, True) if self.kind in STATIC else (False,):
            changes: list[Change] = []
            notes = [f"written as longrope: {why}" for why in refusals]
            for config, paths in owners.items():
                fields, said = self._fields(config_at(model, config), model.get_submodule(paths[0]), compose)
                fields |= _head_dim(model, anatomy, config)
                changes += [Change(config, name, value) for name, value in fields.items()]
                notes += [note for note in said if note not in notes]
            found = difference(model, changes)
            if isinstance(found, Difference):
                return changes, notes, found
            refusals.append(found)
        raise AttnPatchError(f"{anatomy.architecture}: {refusals[0]}.")

    def _owners(self, model: PreTrainedModel, anatomy: Anatomy) -> dict[str, list[str]]:
        """Return, for each config with rotary parameters, the modules that it builds; or refuse."""
        owners: dict[str, list[str]] = {}
        for rotary in anatomy.rotary:
            private = getattr(model.get_submodule(rotary.path), "config", None)
            if rotary.config is None and getattr(private, "rope_parameters", None):
                raise UnsupportedArchitecture(
                    f"{rotary.path}: {anatomy.architecture} keeps a private copy of its config for each rotary base, "
                    "which one scaling in the model's config does not describe."
                )
            if rotary.config is None or not getattr(config_at(model, rotary.config), "rope_parameters", None):
                continue
            needed = _required_arguments(type(model.get_submodule(rotary.path)))
            if needed != ["config"]:
                raise UnsupportedArchitecture(
                    f"{rotary.path}: {rotary.kind} is built from {needed}, not from a config."
                )
            owners.setdefault(rotary.config, []).append(rotary.path)
        if not owners:
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: rope scaling needs a rotary module built from config.rope_parameters; "
                f"positions here are: {anatomy.positions}."
            )
        return owners

    def _fields(self, config: PretrainedConfig, module: nn.Module, compose: bool) -> tuple[dict[str, Any], list[str]]:
        """Return the fields to set in one config, and what to tell the user."""
        old: Mapping[str, Any] = config.rope_parameters
        nested = [key for key, value in old.items() if isinstance(value, Mapping)]
        chosen = self._chosen(nested)
        window, new = self._window(config), dict(old)
        rest = ", ".join(k for k in nested if k not in chosen) or "nothing"
        notes = [f"scales {', '.join(chosen)}; {rest} left alone"] if nested else []
        for key in chosen or [""]:
            before = old[key] if key else old
            now = Window(window, _frequencies(module, key), _attention_scaling(module, key))
            after = scaled(self, before, now, compose)
            if key and after["rope_type"] == "yarn" and after.get("truncate") is False:
                after = untruncated(after, 2 * len(now.frequencies))
                notes.append("written as longrope: transformers drops truncate where parameters are nested")
            if before.get("rope_type", "default") not in ("default", after["rope_type"]):
                notes.append(f"{before['rope_type']} times {self.kind}, written as {after['rope_type']}")
            new = {**new, key: after} if key else after
        fields: dict[str, Any] = {"rope_parameters": new}
        if self.kind == "dynamic":  # transformers measures its growth against max_position_embeddings
            notes.append("transformers recomputes dynamic angles as the text grows: cached keys keep their old ones")
            return fields, notes
        fields["max_position_embeddings"] = round(window * self.factor)
        if getattr(config, "original_max_position_embeddings", None) is not None:  # Phi-3: outside, with priority
            fields["original_max_position_embeddings"] = new.get("original_max_position_embeddings", window)
        return fields, notes

    def _window(self, config: PretrainedConfig) -> int:
        length = getattr(config, "max_position_embeddings", None)
        if not isinstance(length, int):
            raise UnsupportedArchitecture(
                f"{type(config).__name__}: max_position_embeddings is {length!r}; a factor needs a length to multiply."
            )
        return length

    def _chosen(self, nested: list[str]) -> list[str]:
        if self.layer_types is None:
            return [key for key in nested if not any(word in key for word in _LOCAL)] or nested
        unknown = [key for key in self.layer_types if key not in nested]
        if unknown:
            there = ", ".join(nested) or "none"
            raise AttnPatchError(f"layer type {unknown[0]!r} has no rotary parameters of its own; there are: {there}.")
        return list(self.layer_types)


def _head_dim(model: PreTrainedModel, anatomy: Anatomy, path: str) -> dict[str, int]:
    """Return the head size where the config leaves it open: transformers' formulas read it, the modules derive it."""
    config, sites = config_at(model, path), [s for s in anatomy.sites if s.config == path]
    return {"head_dim": sites[0].head_dim} if sites and vars(config).get("head_dim", 0) is None else {}


def _required_arguments(kind: type[nn.Module]) -> list[str]:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def _frequencies(module: nn.Module, layer_type: str) -> Tensor:
    """Return the present angles per position in fp32, those of the original window where they switch by length."""
    names = (
        (f"{layer_type}_original_inv_freq", f"{layer_type}_inv_freq")
        if layer_type
        else ("original_inv_freq", "inv_freq")
    )
    found = next((getattr(module, n) for n in names if isinstance(getattr(module, n, None), Tensor)), None)
    assert isinstance(found, Tensor)
    return found.detach().to("cpu", torch.float32)


def _attention_scaling(module: nn.Module, layer_type: str) -> float:
    name = f"{layer_type}_attention_scaling" if layer_type else "attention_scaling"
    return float(getattr(module, name, 1.0))


def _rebuild(old: nn.Module) -> nn.Module:
    """Build the module again from its config, which has been edited by now."""
    return type(old)(old.config).to(next(old.buffers()).device)
