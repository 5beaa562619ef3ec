"""Checks a model on its first layers, as many as contain one of each kind, instead of all.

Layers of one kind have the same classes, hooks, attributes and entries in the per-layer lists of their config (some
families rotate and mask by those), and differ in their numbers only. What could be wrong in those (a non-finite weight,
a layer that never runs) shows in one short forward of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from .configs import all_configs
from .edits import Edit, FirstLayers
from .errors import AttnPatchError
from .upstream import words

_PLAIN = (bool, int, float, str)
_LEFT_OUT = {*vars(nn.Module()), *words.LAYER_NUMBER}  # what every module has, and the layer's index

T = TypeVar("T")


def one_of_each(model: PreTrainedModel, sites: Sequence[str]) -> FirstLayers | None:
    """Return the edit that keeps the first layers, as many as contain one of each kind.

    None if modules attend in more than one list of layers, or no layer would be dropped.

    Args:
        model: patched or not; it is only read.
        sites: paths of all attention modules.
    """
    parts = sites[0].split(".") if sites else []
    cut = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    path = ".".join(parts[:cut])
    layers = model.get_submodule(path) if cut else None
    if not isinstance(layers, nn.ModuleList) or not all(site.startswith(f"{path}.") for site in sites):
        return None
    count = 1 + max(_first_alike(model, layers))
    return FirstLayers(path, count) if count < len(layers) else None


def on_few_layers(model: PreTrainedModel, sites: Sequence[str], ask: Callable[[tuple[Edit, ...]], T]) -> T:
    """Answer a question on the first layers; a refusal counts only if the whole model gives it, too.

    Args:
        model: left unchanged.
        sites: paths of all attention modules.
        ask: called with edits that shorten the model, to be added to its own; with none for the whole model.
    """
    cut = one_of_each(model, sites)
    if cut is not None:
        try:
            return ask((cut,))
        except AttnPatchError:  # some cannot run without all of their layers
            pass
    return ask(())


def left(cut: FirstLayers, paths: Sequence[str]) -> tuple[str, ...]:
    """Return the paths that still exist after the cut."""
    return tuple(path for path in paths if (_number(cut, path) or 0) < cut.count)


def calls_of_all(model: nn.Module, cut: FirstLayers, calls: Mapping[str, int], paths: Sequence[str]) -> dict[str, int]:
    """Return how often modules run in the whole model: as often as in the first layer of their kind.

    Args:
        model: the whole model.
        cut: the edit after which it ran.
        calls: how often modules ran then, by path.
        paths: of the modules in question; those that do not run are left out.
    """
    alike = _first_alike(model, model.get_submodule(cut.path))
    found = {}
    for path in paths:
        number = _number(cut, path)
        twin = path if number is None else _renumbered(cut, path, alike[number])
        found[path] = calls.get(twin, 0)
    return {path: count for path, count in found.items() if count}


def _number(cut: FirstLayers, path: str) -> int | None:
    """Return the index of the layer that contains a module, None if none does."""
    inside = path.removeprefix(f"{cut.path}.") if path.startswith(f"{cut.path}.") else ""
    return int(inside.split(".")[0]) if inside else None


def _renumbered(cut: FirstLayers, path: str, number: int) -> str:
    _, *rest = path.removeprefix(f"{cut.path}.").split(".")
    return ".".join((cut.path, str(number), *rest))


def _first_alike(model: PreTrainedModel, layers: nn.Module) -> list[int]:
    """Return, for each layer, the index of the first layer of its kind."""
    found = list(layers.children())
    fields = [value for config in all_configs(model) for value in vars(config).values()]
    lists = [value for value in fields if isinstance(value, (list, tuple)) and len(value) == len(found)]
    kinds = [(_kind(layer), [_what(each[n]) for each in lists]) for n, layer in enumerate(found)]
    return [kinds.index(kind) for kind in kinds]


def _kind(layer: nn.Module) -> Any:
    """Return what distinguishes layers: classes, hooks and attributes of their modules, except the layer's index."""
    return [
        (
            path,
            type(module),
            [type(hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())],
            {k: t if t is None else t.shape for k, t in (*module._parameters.items(), *module._buffers.items())},
            {k: _what(v) for k, v in vars(module).items() if k not in _LEFT_OUT},
        )
        for path, module in layer.named_modules()
    ]


def _what(value: Any) -> Any:
    """Return a plain value itself, and the class of anything else."""
    plain = isinstance(value, _PLAIN)
    if isinstance(value, (tuple, list)):
        return [_what(item) for item in value]
    return value if plain else type(value)


__all__ = ["calls_of_all", "left", "on_few_layers", "one_of_each"]
