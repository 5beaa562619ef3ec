"""The edits of a rope scaling with a factor for each request and row."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy
from ..configs import config_at
from ..edits import AddHook, AddPreHook, Edit, ReplaceModule, SetAttribute
from ..errors import UnsupportedArchitecture
from ..interruption import inside
from ..patch import Proposal, changed
from ..twin import Change, difference
from ..upstream import words
from ..upstream.roles import roles_of
from .config import declared_window, head_dim
from .fields import STATIC
from .parameters import taken_over
from .request_angles import Growth, RequestAngles
from .request_generate import Generate, PrepareCache
from .request_length import ChooseLengths, KeepLengths, Requests

_SWITCHING = (
    "dynamic",
    "longrope",
)  # kinds that switch by the length of a forward


def request_proposal(patch: Any, model: PreTrainedModel, anatomy: Anatomy, owners: Mapping[str, list[str]]) -> Proposal:
    """Return the proposal of the hooks.

    Args:
        patch: a ``RopeScaling`` with ``per_request``.
        model: the model to patch.
        anatomy: the model's anatomy.
        owners: rotary modules by the config that builds them.

    Raises:
        UnsupportedArchitecture: the model's forward does not show its rows, or more than angles would change.
        AttnPatchError: an existing scaling that the wanted one cannot multiply.
    """
    (path, rotary), *others = owners.items()
    if others or model.config.is_encoder_decoder:
        kind = "several configs with rotary parameters" if others else "an encoder and a decoder"
        raise UnsupportedArchitecture(f"{anatomy.architecture}: {kind}; per_request needs one text model alone.")
    config, decoder = config_at(model, path), _decoder(model, rotary)
    base = _base(patch, config)
    trained = patch.trained_length or base.trained
    wanted = dataclasses.replace(base.want, trained_length=trained)
    open_fields = [Change(path, *field) for field in head_dim(model, anatomy, path).items()]
    growth, note = _growth(wanted, model, base, path, rotary, open_fields)
    requests = Requests(trained)
    sized = [] if patch.restored else list(_resized(patch, model, anatomy, path, rotary))
    edits: list[Edit] = [*sized, *(ReplaceModule(p, base.rebuild, "rope: unscaled") for p in rotary if base.changed)]
    edits += [
        AddHook(p, RequestAngles(requests, growth, roles_of(model.get_submodule(p))), "angles by request")
        for p in rotary
    ]
    edits.append(
        AddPreHook(decoder, ChooseLengths(requests, roles_of(model.get_submodule(decoder))), "lengths of requests")
    )
    edits.append(AddHook(decoder, KeepLengths(requests), "lengths stay with the cache"))
    if model.can_generate():
        edits.append(SetAttribute("", "generate", Generate(model, requests)))
        edits.append(SetAttribute("", "_prepare_cache_for_generation", PrepareCache(model, requests)))
    said = f"one factor for each request and row: 1 up to {trained} tokens, then by prompt and max_new_tokens"
    kept = changed(patch, trained_length=trained)
    notes = (said, *([note] if note else ()))
    return Proposal(tuple(edits), tuple(rotary), notes, stock=False, claims=("the positions",), patch=kept)


@dataclass(frozen=True)
class _Base:
    """The scaling within the trained window.

    Attributes:
        want: the scaling beyond it, including what was converted.
        trained: tokens of the window.
        parameters: rotary parameters within the window.
        changed: whether the present parameters depend on the length, so that they must be replaced.
    """

    want: Any
    trained: int
    parameters: dict[str, Any]
    changed: bool

    def rebuild(self, old: nn.Module) -> nn.Module:
        """Build the rotary module of the window, with its own config."""
        return self.on_cpu(old).to(next(old.buffers()).device)

    def on_cpu(self, old: nn.Module) -> nn.Module:
        """Build it with real numbers, even while a model is built on the meta device."""
        config: Any = copy.copy(old.config)
        Change("", "rope_parameters", self.parameters).assign(config)
        kind: Any = type(old)
        made: nn.Module = inside(torch.device("cpu"), lambda: kind(config))
        return made


def _base(patch: Any, config: PretrainedConfig) -> _Base:
    old = config.rope_parameters
    for name, each in old.items():
        if isinstance(each, Mapping) and each.get("rope_type") in _SWITCHING:
            raise UnsupportedArchitecture(
                f"rope_parameters: {name} has {each['rope_type']!r} scaling, which switches by length itself; "
                "per_request takes that over only where all layers have one."
            )
    if old.get("rope_type") not in _SWITCHING:
        return _Base(patch, declared_window(config), dict(old), False)
    want, parameters = taken_over(patch, old)
    trained = int(old.get("original_max_position_embeddings") or declared_window(config))
    return _Base(want, trained, parameters, True)


def _growth(
    want: Any, model: PreTrainedModel, base: _Base, path: str, rotary: list[str], more: list[Change]
) -> tuple[Growth, str | None]:
    """Return how angles grow: the first of two ways that the family accepts and that changes angles only."""
    module = base.on_cpu(model.get_submodule(rotary[0]))
    refusal = ""
    for compose in (False, True) if want.kind in STATIC else (False,):
        growth = Growth(want, want.trained_length, compose)
        config: Any = module.config
        new = growth.config(config, module, round(want.trained_length * max(want.factor, 2.0)))
        found = difference(model, [*more, Change(path, "rope_parameters", new.rope_parameters)])
        if isinstance(found, str):
            refusal = refusal or found
            continue
        outside = [p for p in (*found.modules, *(where for where, _ in found.attributes)) if p not in rotary]
        if outside:
            raise UnsupportedArchitecture(
                f"{outside[0]}: would have to change with the scaling, too, which a factor by request does not reach."
            )
        return growth, f"written as longrope: {refusal}" if compose else None
    raise UnsupportedArchitecture(f"{type(model).__name__}: {refusal}.")


def _resized(patch: Any, model: PreTrainedModel, anatomy: Anatomy, path: str, rotary: list[str]) -> Iterator[Edit]:
    """Yield the edits that follow from the longer declared context."""
    config = config_at(model, path)
    fields = {
        "max_position_embeddings": round(declared_window(config) * patch.factor),
        **head_dim(model, anatomy, path),
    }
    changes = [Change(path, name, value) for name, value in fields.items()]
    found = difference(model, changes)
    if isinstance(found, str) or [p for p in found.modules if p not in rotary]:
        why = found if isinstance(found, str) else f"{found.modules[0]} has tensors as long as the context"
        raise UnsupportedArchitecture(f"{anatomy.architecture}: {why}.")
    yield from (change.edit() for change in changes)
    yield from (SetAttribute(*key, value) for key, value in found.attributes.items())


def _decoder(model: PreTrainedModel, rotary: list[str]) -> str:
    """Return the path of the model that holds the rotary modules and receives tokens, mask and cache."""
    holders = {path.rpartition(".")[0] for path in rotary}
    holder = next(iter(holders))
    roles = roles_of(model.get_submodule(holder))
    if len(holders) > 1 or not isinstance(model.get_submodule(holder), PreTrainedModel):
        raise UnsupportedArchitecture(
            f"{rotary[0]}: stands inside a layer, where the length of a request is not known; per_request needs one "
            "rotary module for all layers."
        )
    if not (roles.takes(words.TOKENS) or roles.takes(words.EMBEDDINGS)):
        raise UnsupportedArchitecture(f"{holder or 'the model'}: its forward takes no tokens; per_request needs them.")
    return holder
