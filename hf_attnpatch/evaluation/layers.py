"""Measures at which depth a changed model differs from the original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..interruption import removing
from ..progress import track
from ..upstream import words
from ..upstream.roles import roles_of
from .logits import forward
from .mode import device_of, measuring
from .result import Result


@dataclass(frozen=True)
class LayerDifference(Result):
    """How far the output of each attention module is from the original's.

    Errors are squared, summed over the tokens, over the variance of the original's output: 0 is the same, 1 is as wrong
    as its mean.

    Attributes:
        paths: of the attention modules, in order.
        alone: error of each module on the inputs that it has in the original: its own damage.
        in_place: error of each module inside its own model, errors of the layers before it included.
        tokens: that were looked at.
    """

    paths: tuple[str, ...]
    alone: tuple[float, ...]
    in_place: tuple[float, ...]
    tokens: int


def layer_difference(
    original: nn.Module, patched: nn.Module, sequences: Sequence[Tensor], *, paths: Sequence[str]
) -> LayerDifference:
    """Compare attention modules, each on the original's inputs and inside its own model.

    For the first, the changed model runs once more with the hidden states before every attention module replaced by the
    original's; its positions and masks are its own, so that a change of theirs shows.

    Args:
        original: a causal language model.
        patched: another with attention modules under the same names.
        sequences: token ids, each of shape (length,), int64.
        paths: names of the attention modules.

    Raises:
        EvaluationError: a module is missing, takes no hidden states, or gives something that is not finite.
    """
    for model in (original, patched):
        _check_paths(model, paths)
    sums = {path: _Sums() for path in paths}
    tokens = 0
    with measuring(original), measuring(patched):
        for ids in track(list(sequences), "layers"):
            truth = _run(original, ids, paths)
            place = _run(patched, ids, paths)
            alone = _run(patched, ids, paths, {path: taken for path, (taken, _) in truth.items()})
            tokens += len(ids)
            for path in paths:
                sums[path].add(truth[path][1], alone[path][1], place[path][1])
    for path, found in sums.items():
        if not torch.isfinite(torch.tensor([found.alone, found.in_place, found.variance])).all():
            raise EvaluationError(f"{path}: its output is not finite in one of the models; nothing can be compared.")
    return LayerDifference(
        tuple(paths),
        tuple(s.alone / s.variance for s in sums.values()),
        tuple(s.in_place / s.variance for s in sums.values()),
        tokens,
    )


class _Sums:
    """Squared errors of one module, and the variance of its outputs."""

    def __init__(self) -> None:
        self.alone = self.in_place = self.square = 0.0
        self.total: Tensor | None = None
        self.count = 0

    def add(self, truth: Tensor, alone: Tensor, in_place: Tensor) -> None:
        """Add the outputs for one sequence, each (tokens, width)."""
        self.alone += float((alone - truth).square().sum())
        self.in_place += float((in_place - truth).square().sum())
        self.square += float(truth.square().sum())
        self.total = truth.sum(dim=0) + (0 if self.total is None else self.total)
        self.count += len(truth)

    @property
    def variance(self) -> float:
        """Summed over tokens and width; at least what float32 resolves."""
        assert self.total is not None
        return max(self.square - float(self.total.square().sum()) / self.count, 1e-12 * self.square, 1e-30)


def _run(
    model: nn.Module, ids: Tensor, paths: Sequence[str], given: dict[str, Tensor] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run one sequence; return each module's hidden states (1, tokens, width) and output (tokens, width)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(_watched(model.get_submodule(path), path, found, (given or {}).get(path)))
        forward(model, {words.TOKENS: ids[None].to(device_of(model)), words.USE_CACHE: False})
    silent = [path for path in paths if path not in found]
    if silent:
        raise EvaluationError(f"{silent[0]}: never ran; leave it out of the modules that are compared.")
    return found


@contextlib.contextmanager
def _watched(
    module: nn.Module, path: str, found: dict[str, tuple[Tensor, Tensor]], given: Tensor | None
) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = roles_of(module).bind(args, kwargs)
        hidden = named.get(words.STATES)
        if not isinstance(hidden, Tensor):
            raise EvaluationError(f"{path}: takes no hidden states that could be exchanged; leave layers out.")
        replaced = hidden if given is None else given.to(hidden)
        found[path] = (replaced, replaced)
        named.put(words.STATES, replaced)
        return named.back()

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        found[path] = (found[path][0], out.detach().double().flatten(0, -2))

    with removing() as handles:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
        yield


def _check_paths(model: nn.Module, paths: Sequence[str]) -> None:
    names = {name for name, _ in model.named_modules()}
    missing = [path for path in paths if path not in names]
    if missing or not paths:
        what = f"has no module {missing[0]}" if missing else "was given no modules to compare"
        raise EvaluationError(f"{type(model).__name__}: {what}; the two models must have the same attention modules.")
