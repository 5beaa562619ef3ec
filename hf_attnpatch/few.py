"""A model cut after its first layers, as many as have one of each kind: what holds there holds in all, for less.

Layers of one kind have the same classes, hooks, attributes and entries in the lists of their config (some families turn
and mask by those), and differ in their numbers only. What could hide in those (a weight that is not finite, a layer
that never runs) one short forward of the whole model shows.
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
_LEFT_OUT = {*vars(nn.Module()), *words.LAYER_NUMBER}  # what every module has, and the layer's own number

T = TypeVar("T")


def one_of_each(model: PreTrainedModel, sites: Sequence[str]) -> FirstLayers | None:
    """Return the edit that leaves the first layers which have one of each kind.

    None where modules attend in more than one list of layers, or nothing would be saved.

    Args:
        model: patched or not; it is only read.
        sites: paths of all modules that attend.
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
    """Ask a question of the first layers; a refusal is an answer only if the whole model gives it, too.

    Args:
        model: it is left as it was.
        sites: paths of all modules that attend.
        ask: is given the edits to add to its own, so that the model is short; none for the whole model.
    """
    cut = one_of_each(model, sites)
    if cut is not None:
        try:
            return ask((cut,))
        except AttnPatchError:  # some cannot run without all of their layers
            pass
    return ask(())


def left(cut: FirstLayers, paths: Sequence[str]) -> tuple[str, ...]:
    """Return those of some paths that are still there after the cut."""
    return tuple(path for path in paths if (_number(cut, path) or 0) < cut.count)


def calls_of_all(model: nn.Module, cut: FirstLayers, calls: Mapping[str, int], paths: Sequence[str]) -> dict[str, int]:
    """Return how often modules run in the whole model: as often as that in the first layer of their kind.

    Args:
        model: whole.
        cut: after which it was run.
        calls: how often modules ran then, by path.
        paths: of the modules to tell of; those that do not run are left out.
    """
    alike = _first_alike(model, model.get_submodule(cut.path))
    found = {}
    for path in paths:
        number = _number(cut, path)
        twin = path if number is None else _renumbered(cut, path, alike[number])
        found[path] = calls.get(twin, 0)
    return {path: count for path, count in found.items() if count}


def _number(cut: FirstLayers, path: str) -> int | None:
    """Return the number of the layer that a module is in, None where it is in none of them."""
    inside = path.removeprefix(f"{cut.path}.") if path.startswith(f"{cut.path}.") else ""
    return int(inside.split(".")[0]) if inside else None


def _renumbered(cut: FirstLayers, path: str, number: int) -> str:
    _, *rest = path.removeprefix(f"{cut.path}.").split(".")
    return ".".join((cut.path, str(number), *rest))


def _first_alike(model: PreTrainedModel, layers: nn.Module) -> list[int]:
    """Return, for each layer, the number of the first one of its kind."""
    found = list(layers.children())
    fields = [value for config in all_configs(model) for value in vars(config).values()]
    lists = [value for value in fields if isinstance(value, (list, tuple)) and len(value) == len(found)]
    kinds = [(_kind(layer), [_what(each[n]) for each in lists]) for n, layer in enumerate(found)]
    return [kinds.index(kind) for kind in kinds]


def _kind(layer: nn.Module) -> Any:
    """What tells layers apart: their modules' classes, hooks and attributes, but for the layer's own number."""
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
    """Plain values count as they are, anything else by its class."""
    plain = isinstance(value, _PLAIN)
    if isinstance(value, (tuple, list)):
        return [_what(item) for item in value]
    return value if plain else type(value)


__all__ = ["calls_of_all", "left", "on_few_layers", "one_of_each"]
