"""Compares a model with what transformers would build from an edited config, both on the meta device.

This replaces a table of attributes per family: the difference between the module trees of the model's own config and of
an edited copy *is* what has to change. Stock transformers can express a patch exactly if the difference is confined to
the intended places.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from .configs import skeleton
from .edits import Edit, SetAttribute, SetConfig
from .errors import UnsupportedArchitecture

Plain = (bool, int, float, str, tuple, list, type(None))


class Change(NamedTuple):
    """One config field: dotted path of the sub-config (empty for the model's own), name, new value."""

    path: str
    field: str
    value: Any

    def assign(self, config: PretrainedConfig) -> None:
        """Set it on a (copied) config."""
        for name in filter(None, self.path.split(".")):
            config = getattr(config, name)
        setattr(config, self.field, copy.deepcopy(self.value))

    def edit(self) -> SetConfig:
        """Return the edit that sets it on a model."""
        return SetConfig(self.path, self.field, self.value)


@dataclass(frozen=True)
class Difference:
    """The difference between both module trees.

    Attributes:
        before: the model built from its own config, on the meta device.
        twin: the model built from the edited config, on the meta device.
        modules: paths of the outermost modules whose parameters or buffers have other shapes or names.
        attributes: (path, name) -> value of plain attributes that differ, outside those modules.
    """

    before: nn.Module
    twin: nn.Module
    modules: tuple[str, ...]
    attributes: dict[tuple[str, str], Any]

    def edits(self, changes: Sequence[Change], paths: Sequence[str], where: str) -> list[Edit]:
        """Return the edits of configs and attributes; modules at ``paths`` are rebuilt by the caller.

        Raises:
            UnsupportedArchitecture: another module's tensors would have to change as well.
        """
        longer = [path for path in self.modules if path not in paths]
        if longer:
            raise UnsupportedArchitecture(
                f"{longer[0] or where}: has tensors as long as the context, which this would not resize."
            )
        attributes = (SetAttribute(*key, value) for key, value in self.attributes.items() if key[0] not in paths)
        return [*(change.edit() for change in changes), *attributes]


def difference(model: PreTrainedModel, changes: Sequence[Change]) -> Difference | str:
    """Build the model's class from its config and from an edited copy, and compare them.

    Args:
        model: gives the class and the config; it is not touched and its weights are not read.
        changes: fields to set on the copy.

    Returns:
        The difference, or a sentence why there is none.
    """
    try:
        before, after = _build(model, ()), _build(model, changes)
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
        StrictDataclassError,
    ) as error:
        return f"cannot be built from the changed config: {' '.join(str(error).split())}"
    changed = _changed_modules("", before, after)
    inside = tuple(f"{path}." for path in changed)
    attributes = {
        key: value
        for key, value in _changed_attributes(before, after)
        if key[0] not in changed and not key[0].startswith(inside)
    }
    return Difference(before, after, tuple(changed), attributes)


def _build(model: PreTrainedModel, changes: Sequence[Change]) -> nn.Module:
    def changed(config: PretrainedConfig) -> None:
        for change in changes:
            change.assign(config)
        validate = getattr(config, "validate", None)  # the check that from_pretrained will run
        if changes and validate is not None:
            validate()

    twin: nn.Module = skeleton(model, changed)
    return twin


def _tensors(module: nn.Module) -> dict[str, torch.Size]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.shape for name, tensor in own}


def _changed_modules(path: str, before: nn.Module, after: nn.Module) -> list[str]:
    children, others = dict(before.named_children()), dict(after.named_children())
    if _tensors(before) != _tensors(after) or children.keys() != others.keys() or type(before) is not type(after):
        return [path]
    found: list[str] = []
    for name, child in children.items():
        found += _changed_modules(f"{path}.{name}".lstrip("."), child, others[name])
    return found


def _changed_attributes(before: nn.Module, after: nn.Module) -> list[tuple[tuple[str, str], Any]]:
    others = dict(after.named_modules())
    found = []
    for path, module in before.named_modules():
        if path not in others:
            continue
        old, new = _plain(module), _plain(others[path])
        found += [((path, name), new[name]) for name in new if name not in old or old[name] != new[name]]
    return found


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, Plain) and not k.startswith("_")}


def converted(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers fuses or splits this parameter on saving and loading (not merely renames it)."""
    transforms = get_model_conversion_mapping(model)
    fused = [t for t in transforms if isinstance(t, WeightConverter)]
    return any(re.search(pattern, name) for t in fused for pattern in t.target_patterns)
