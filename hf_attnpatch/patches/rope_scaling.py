"""Scales rotary frequencies by every method that transformers computes itself, on top of an existing scaling."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..configs import config_at
from ..edits import ReplaceModule
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..patch import Patch, Proposal, changed, decided
from ..rope.config import declared_window, head_dim, scaled_fields
from ..rope.fields import (
    KINDS,
    STATIC,
    changes_something,
    check_belonging,
    check_number,
    check_reach,
    checked_factors,
    factor_to,
)
from ..rope.request_angles import RequestAngles
from ..rope.requests import request_proposal
from ..twin import Change, Difference, difference


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Patch):
    """Rotary scaling (position interpolation, NTK, YaRN, LongRoPE ...): a longer context by lower rotary frequencies.

    ``rope_theta`` and partial rotation are kept. An existing scaling is multiplied, not replaced: the same kind gets
    the product of the factors; another (static) kind is composed frequency by frequency and written as ``longrope``,
    which stock transformers can express. Config and rotary modules change together. In models with rotary parameters
    per layer type, only layers that attend to the whole context are scaled.

    Args:
        kind: ``linear`` (2306.15595), ``ntk`` (another ``rope_theta``), ``ntk_by_parts`` (``yarn`` that leaves cos and
            sin alone), ``yarn`` (2309.00071), ``llama3``, ``longrope`` (2402.13753), ``dynamic`` (NTK by the length so
            far, as transformers computes it), ``resonance`` (2403.00071: wavelengths below the trained window rounded
            to whole tokens), ``clipped`` (2602.05258: the lowest frequencies tapered to zero) or ``dynamic_yarn``
            (``yarn`` with ``per_request``). Resonance and clipping stretch nothing by themselves: put them on top of
            another kind.
        factor: new context over old, at least 1; 1 changes nothing, except for ``resonance`` and ``clipped``.
        target_length: the same as a context in tokens, relative to the config's; give one of the two.
        beta_fast: for ``yarn``: frequencies with more turns than this in the old window are kept.
        beta_slow: for ``yarn``: frequencies with fewer turns than this are interpolated.
        low_freq_factor: for ``llama3``: wavelengths above old / low are divided.
        high_freq_factor: for ``llama3``: wavelengths below old / high are kept.
        long_factor: for ``longrope``: a divisor for each rotated frequency beyond the old window; None takes YaRN's.
        short_factor: for ``longrope``: the same within the old window; None takes 1.
        attention_factor: for ``yarn`` and ``longrope``: factor on cos and sin; None takes the paper's.
        truncate: for ``yarn`` and ``ntk_by_parts``: whether the ramp begins and ends at whole frequency indices.
        clip_frequencies: for ``clipped``: how many are tapered; None takes the paper's share, 20 of 64.
        layer_types: for models with parameters per layer type: which to scale; None takes those that are not local.
        per_request: choose a factor for each row of a batch when its request begins: 1 if prompt and ``max_new_tokens``
            fit into the trained window (the row then has the bits of the unscaled model), otherwise their length over
            the window. It is kept while the text is decoded, see :func:`hf_attnpatch.request`; ``factor`` is what the
            config declares, not a limit. With ``dynamic``, it is that formula with the final length; a model that
            already has ``dynamic`` or ``longrope`` scaling is converted by the same kind and a factor of 1. Checkpoints
            have this package's model type.
        trained_length: for ``per_request``: the window in tokens; None takes what the config declares.

    Raises:
        UnsupportedArchitecture: no rotary module built from ``config.rope_parameters``.
        AttnPatchError: an unknown kind, a factor below 1, or a scaling that cannot be multiplied.
    """

    name: ClassVar[str] = "rope_scaling"
    changes_positions: ClassVar[bool] = True

    kind: Literal[
        "linear", "ntk", "ntk_by_parts", "yarn", "llama3", "resonance", "clipped", "longrope", "dynamic", "dynamic_yarn"
    ]
    factor: float | None = None
    target_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    long_factor: Sequence[float] | None = None
    short_factor: Sequence[float] | None = None
    attention_factor: float | None = None
    truncate: bool = True
    clip_frequencies: int | None = None
    layer_types: Sequence[str] | None = None
    per_request: bool = False
    trained_length: int | None = None
    # while a checkpoint is loaded, its config has been edited already
    restored: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            found = "is missing" if repr(self.kind) == "missing" else f"{self.kind!r} does not exist"
            raise AttnPatchError(f"kind {found}; choose from: {', '.join(KINDS)}.")
        check_reach(self.factor, self.target_length)
        if self.factor is None and self.target_length is None:
            raise AttnPatchError(
                "rope_scaling: factor is missing; give it, new context over old, or target_length, in tokens."
            )
        if self.kind == "dynamic_yarn":  # there is no other
            self._normalise("per_request", True)
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

    def structure(self) -> Patch:
        """Return the patch for a model that is built from a config with this patch's fields."""
        return changed(self, restored=True)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that rebuild rotary modules; see :meth:`Patch.propose`."""
        owners = self._owners(model, anatomy)
        if self.target_length is not None:
            factor = factor_to(self.target_length, declared_window(config_at(model, next(iter(owners)))))
            return decided(changed(self, factor=factor, target_length=None), model, anatomy)
        if self.per_request and (self.restored or changes_something(self) or _switches(model, owners)):
            return request_proposal(self, model, anatomy, owners)
        if not changes_something(self):
            return Proposal((), (), ("a factor of 1 changes nothing",), preserves=True)
        changes, notes, found = self._tried(model, anatomy, owners)
        paths = [path for group in owners.values() for path in group]
        edits = found.edits(changes, paths, anatomy.architecture)
        edits += [ReplaceModule(path, _rebuild, f"rope: {self.kind}") for path in paths]
        return Proposal(tuple(edits), tuple(paths), tuple(notes), claims=("the positions",))

    def _tried(
        self, model: PreTrainedModel, anatomy: Anatomy, owners: Mapping[str, list[str]]
    ) -> tuple[list[Change], list[str], Difference]:
        """Return config changes that the family accepts, notes on them, and what else they change in the model."""
        refusals: list[str] = []
        for compose in (False, True) if self.kind in STATIC else (False,):
            changes: list[Change] = []
            notes = [f"written as longrope: {why}" for why in refusals]
            for config, paths in owners.items():
                old, module = config_at(model, config), model.get_submodule(paths[0])
                fields, said = scaled_fields(self, old, module, declared_window(old), compose)
                fields |= head_dim(model, anatomy, config)
                changes += [Change(config, name, value) for name, value in fields.items()]
                notes += [note for note in said if note not in notes]
            found = difference(model, changes)
            if isinstance(found, Difference):
                return changes, notes, found
            refusals.append(found)
        raise AttnPatchError(f"{anatomy.architecture}: {refusals[0]}.")

    def _owners(self, model: PreTrainedModel, anatomy: Anatomy) -> dict[str, list[str]]:
        """Return the rotary modules that each config builds, or refuse the model."""
        owners: dict[str, list[str]] = {}
        for rotary in anatomy.rotary:
            private = getattr(model.get_submodule(rotary.path), "config", None)
            if rotary.config is None and getattr(private, "rope_parameters", None):
                raise UnsupportedArchitecture(
                    f"{rotary.path}: {anatomy.architecture} keeps a private copy of its config for each rotary base, "
                    "which one scaling in the model's config does not describe."
                )
            if _by_request(model.get_submodule(rotary.path)):
                raise UnsupportedArchitecture(
                    f"{rotary.path}: its angles are chosen per request already; revert that before another scaling."
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
            advice = "; Rotary(kind=..., factor=...) scales the rotation that Rotary added" if anatomy.turned else ""
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: rope scaling needs a rotary module built from config.rope_parameters; "
                f"positions here are: {anatomy.positions}{advice}."
            )
        return owners


def _required_arguments(kind: type[nn.Module]) -> list[str]:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


def _by_request(module: nn.Module) -> bool:
    return any(isinstance(hook, RequestAngles) for hook in module._forward_hooks.values())


def _switches(model: PreTrainedModel, owners: Mapping[str, list[str]]) -> bool:
    """Return whether the present scaling depends on the length of a forward."""
    return any(config_at(model, path).rope_parameters.get("rope_type") in ("dynamic", "longrope") for path in owners)


def _rebuild(old: nn.Module) -> nn.Module:
    """Rebuild the module from its config, which has been edited by now."""
    return type(old)(old.config).to(next(old.buffers()).device)
