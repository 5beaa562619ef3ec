"""A text goes through a model one layer at a time: each runs on what the one before it gave, and is run no more.

Statistics of one layer may fill the memory. A pass over the whole model for each layer costs as many passes as there
are layers; kept between layers, what they give makes it one. No forward is copied: the model's own runs, in which all
layers but one hand on what they are given, and the first of them what was kept. That this gives the same bits is
tried on a few tokens before it is relied on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..aside import laid
from ..edits import SetAttribute, tried
from ..errors import AttnPatchError
from ..interruption import removing
from ..sites import Site

Run = Callable[[], object]  # one forward of the model


@dataclass
class Layers:
    """The layers of a model, of which one runs.

    Attributes:
        model: in evaluation mode.
        path: of the list of layers.
        count: how many there are.
        shapes: for each layer, how much it returns beside hidden states; None for these alone.
        number: of the layer that runs.
        given: text -> batch -> what that layer is given; nothing for the first layer, which the model itself feeds.
        gives: text -> batch -> what it gave.
    """

    model: PreTrainedModel
    path: str
    count: int
    shapes: list[int | None] = field(default_factory=list)
    number: int = 0
    given: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    gives: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, text: str, keep: bool = True) -> Iterator[Callable[[int], None]]:
        """Let one layer run in the block.

        Args:
            text: name of what is read; batches of another one are kept apart.
            keep: what the layer gives, for the next.

        Yields:
            A function to be told the number of the batch before each forward.
        """
        batch = [0]

        def given() -> Tensor | None:
            return self.given.get(text, {}).get(batch[0])

        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if keep:
                self.gives.setdefault(text, {})[batch[0]] = laid(_hidden(output).detach())

        def tell(number: int) -> None:
            batch[0] = number

        others = [
            SetAttribute(f"{self.path}.{n}", "forward", _HandOn(self.shapes[n], given if n < self.number else None))
            for n in range(self.count)
            if n != self.number
        ]
        with tried(self.model, others), removing() as handles:
            layer = self.model.get_submodule(f"{self.path}.{self.number}")
            handles.append(layer.register_forward_hook(see, with_kwargs=True))
            yield tell

    def go_on(self) -> None:
        """Let the next layer run, on what this one gave."""
        self.given, self.gives, self.number = self.gives, {}, self.number + 1


@dataclass(frozen=True)
class _HandOn:
    """In the place of a layer's forward: gives what was kept, or what it is given."""

    nothing: int | None
    kept: Callable[[], Tensor | None] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = None if self.kept is None else self.kept()
        hidden = (args[0] if args else next(iter(kwargs.values()))) if found is None else found
        return hidden if self.nothing is None else (hidden, *[None] * self.nothing)


def layers_of(model: PreTrainedModel, sites: Sequence[Site], run: Run) -> Layers | None:
    """Return the layers that hold some attention modules, where they can be run one at a time, with the same bits.

    Args:
        model: in evaluation mode; it is left as it was.
        sites: its modules.
        run: one forward, with the head or without, on a few tokens.
    """
    path = _list_of(model, sites)
    if path is None:
        return None
    count = len(model.get_submodule(path))
    whole = _outputs(model, path, count, run)
    shapes = [_beside(found[0]) if len(found) == 1 else -1 for found in whole]
    if any(shape == -1 for shape in shapes):
        return None  # a layer runs several times or never, or gives something else than hidden states
    trial = Layers(model, path, count, shapes)
    for outputs in whole:
        try:
            with trial.running("trial") as tell:
                tell(0)
                run()
        except (AttnPatchError, RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            return None  # it needs of others more than hidden states
        if not torch.equal(trial.gives["trial"][0], _hidden(outputs[0])):
            return None
        trial.go_on()
    return Layers(model, path, count, shapes)


def _list_of(model: nn.Module, sites: Sequence[Site]) -> str | None:
    """Return the path of the one list of layers below which all modules are."""
    parts = sites[0].path.split(".") if sites else []
    cut = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    path = ".".join(parts[:cut])
    found = cut and isinstance(model.get_submodule(path), nn.ModuleList)
    return path if found and all(site.path.startswith(f"{path}.") for site in sites) else None


def _outputs(model: nn.Module, path: str, count: int, run: Run) -> list[list[Any]]:
    """Run the whole model, and return what each layer gave, as often as it ran."""
    found: list[list[Any]] = [[] for _ in range(count)]

    def watch(number: int) -> Callable[..., None]:
        return lambda _, args, output: found[number].append(output)

    with removing() as handles:
        for number in range(count):
            handles.append(model.get_submodule(f"{path}.{number}").register_forward_hook(watch(number)))
        run()
    return found


def _beside(output: Any) -> int | None:
    """Return how much a layer gives beside hidden states: None for these alone; -1 where they do not come first.

    None is handed on in its place. Whether the next layer asks for it (or it was attention weights, say, for whoever
    wants to see them) the trial tells.
    """
    if isinstance(output, Tensor):
        return None
    return len(output) - 1 if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else -1


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def layer_number(layers: Layers, site: Site) -> int:
    """Return the number of the layer that a module is in."""
    return int(site.path.removeprefix(f"{layers.path}.").split(".")[0])


__all__ = ["Layers", "layer_number", "layers_of"]
