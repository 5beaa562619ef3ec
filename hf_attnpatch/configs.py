"""A model's tree of configs, and models built from a config on the meta device."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from .interruption import ensured, inside

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def config_at(model: PreTrainedModel, path: str) -> PretrainedConfig:
    """Return the model's config, or the sub-config at a dotted path below it."""
    config = model.config
    for name in filter(None, path.split(".")):
        config = getattr(config, name)
    return config


def config_path(model: PreTrainedModel, config: object) -> str | None:
    """Return the dotted path of a config object below the model's, empty for the model's own, None if not there."""
    todo: list[tuple[str, Any]] = [("", model.config)]
    while todo:
        path, found = todo.pop()
        if found is config:
            return path
        todo += [(f"{path}.{k}".lstrip("."), v) for k, v in vars(found).items() if isinstance(v, PretrainedConfig)]
    return None


def all_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Return every config object that a module of the model holds, sub-configs included."""
    todo = [m.config for m in model.modules() if isinstance(getattr(m, "config", None), PretrainedConfig)]
    found: dict[int, PretrainedConfig] = {}
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    return list(found.values())


def declared(config: PretrainedConfig, name: str, absent: Any = None) -> Any:
    """Return a field of a config, or ``absent`` where neither its class nor one above it declares the field.

    A checkpoint that was converted from another type often keeps fields that its model does not read.
    """
    made = (vars(kind).get("__init__") for kind in type(config).__mro__)
    known = {name for init in made if inspect.isfunction(init) for name in inspect.signature(init).parameters}
    return getattr(config, name, absent) if config.attribute_map.get(name, name) in known else absent


_BUILDING: ContextVar[bool] = ContextVar("hf_attnpatch_building", default=False)


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Allow building transformers' classes from a patched config, to restore what is missing or only to compare."""
    before = _BUILDING.get()
    with ensured(lambda: _BUILDING.set(before)):
        _BUILDING.set(True)
        yield


def is_building() -> bool:
    """Whether this thread is inside :func:`building`."""
    return _BUILDING.get()


def skeleton(
    model: PreTrainedModel, change: Callable[[PretrainedConfig], None] | None = None, attention: str | None = None
) -> Any:
    """Build the model's class again on the meta device: its modules without data. The model is only read.

    Args:
        model: gives the class and the config.
        change: edits the copy of the config.
        attention: the attention implementation of the copy; None keeps the model's.
    """
    config = copy.deepcopy(model.config)
    if change is not None:
        change(config)
    if attention is not None:
        config._attn_implementation = attention
    cls: Any = getattr(type(model), "unpatched", type(model))  # a patched class would re-apply its record
    with building():
        return inside(torch.device("meta"), lambda: cls(config))
