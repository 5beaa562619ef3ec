"""Sinks that stand for the first tokens of a text, which a window loses: in closed form, then layer by layer.

A pretrained model's heads rest on the first tokens, which carry almost no value. A window takes them away, and their
weight falls on the rest. A sink gives it back: ``sum_window e^s v / (sum_window e^s + e^sink)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.registry import set_kernel
from ..attention.wrapper import AddWrapper
from ..edits import tried
from ..heads.refine import descend
from ..heads.replay import Call, Streams, Taps, recording
from ..heads.weights import read_weights
from ..probe import input_device, quiet
from ..progress import track
from ..sites import Site
from ..upstream import words
from ..upstream.roles import roles_of
from .attention import Hearing, Narrowed

SHUT = -1e4  # a sink that takes nothing
_LEARNING_RATE = 0.1  # nats
_HALVINGS = 60


@dataclass(frozen=True)
class Gap:
    """Squared error of a module's output over its variance, on a row that no step has seen.

    Attributes:
        plain: with the window alone.
        closed: with the sinks in closed form.
        refined: with those that were refined; None where there was no second row to refine on.
    """

    plain: float
    closed: float
    refined: float | None


def closed_form(window: Tensor, first: Tensor) -> Tensor:
    """Return the sinks that take, on average over queries, the weight of the first tokens beside a window.

    The sink of a head solves ``mean_q sigmoid(sink - w_q) = mean_q sigmoid(f_q - w_q)``, which has one answer, as the
    left side grows with the sink.

    Args:
        window: w, log-sum-exp of the scores in the window, (heads, queries).
        first: f, the same of the first tokens, (heads, queries).

    Returns:
        (heads,), float32.
    """
    wanted = torch.sigmoid(first - window).mean(1)
    low, high = (torch.minimum if least else torch.maximum for least in (True, False))
    bottom, top = low(first, window).amin(1) - 50, high(first, window).amax(1) + 50
    for _ in range(_HALVINGS):
        middle = (bottom + top) / 2
        short = torch.sigmoid(middle[:, None] - window).mean(1) < wanted
        bottom, top = torch.where(short, middle, bottom), torch.where(short, top, middle)
    return ((bottom + top) / 2).clamp(min=SHUT).float()


def find(
    model: PreTrainedModel, paths: Sequence[str], window: int, first: int, rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the sinks of attention modules in closed form, measured on rows of text.

    Args:
        model: left as it was.
        paths: of the modules that are to see a window.
        window: in tokens.
        first: tokens at the beginning of a row that the sinks stand for.
        rows: token ids, (length,).
    """
    ears = {path: Hearing(window, first) for path in paths}
    edits = [*(AddWrapper(path, ear) for path, ear in ears.items()), set_kernel("sdpa")]
    with quiet(model), torch.no_grad(), tried(model, edits):
        for row in track(rows, "listening to first tokens"):
            _run(model, row)
    return {
        path: closed_form(*(torch.cat([getattr(h, side) for h in ear.heard], 1) for side in ("window", "first")))
        for path, ear in ears.items()
    }


def refined(
    model: PreTrainedModel,
    sites: Sequence[Site],
    window: int,
    sinks: Mapping[str, Tensor],
    rows: Sequence[Tensor],
    steps: int,
) -> tuple[dict[str, Tensor], dict[str, Gap]]:
    """Improve sinks by gradient descent, each module towards its own output without a window.

    The first row is held out: sinks that are no better on it stay what they were.

    Args:
        model: left as it was.
        sites: the modules that are to see a window, with an output projection.
        window: in tokens.
        sinks: to begin with, by path.
        rows: token ids, (length,).
        steps: of Adam; 0 measures only.
    """
    trials = {site.path: Narrowed(window) for site in sites}
    calls: dict[str, list[Call]] = {site.path: [] for site in sites}
    better, gaps = dict(sinks), {}
    edits = [*(AddWrapper(path, trial) for path, trial in trials.items()), set_kernel("sdpa")]
    with quiet(model), tried(model, edits):
        for trial in trials.values():
            trial.active = False

        def see(site: Site, call: Call, _: Streams) -> None:
            calls[site.path].append(call)

        with torch.no_grad(), recording(model, sites, see):
            for row in rows:
                _run(model, row)
        for site in track(sites, "refining sinks"):
            layer = _Layer(Taps(model, site), trials[site.path])
            better[site.path], gaps[site.path] = layer.refined(calls.pop(site.path), sinks[site.path], steps)
    return better, gaps


class _Layer:
    """One attention module with a window that can be switched on."""

    def __init__(self, taps: Taps, trial: Narrowed):
        self.taps, self.trial = taps, trial
        self.weights = read_weights(taps.model, taps.site)

    def refined(self, calls: Sequence[Call], start: Tensor, steps: int) -> tuple[Tensor, Gap]:
        targets = [self._output(call, active=False) for call in calls]
        with torch.no_grad():
            plain, closed = (float(self._error(calls[0], targets[0], sinks)) for sinks in (None, start))
        if steps == 0 or len(calls) == 1:
            return start, Gap(plain, closed, None)
        sinks = start.clone().requires_grad_()

        def loss(step: int) -> Tensor:
            at = 1 + step % (len(calls) - 1)
            return self._error(calls[at], targets[at], sinks)

        descend({"sinks": sinks}, {"sinks": _LEARNING_RATE}, loss, steps)
        found = sinks.detach()
        with torch.no_grad():
            after = float(self._error(calls[0], targets[0], found))
        return (found, Gap(plain, closed, after)) if after < closed else (start, Gap(plain, closed, closed))

    def _output(self, call: Call, *, active: bool) -> Tensor:
        self.trial.active = active
        with torch.set_grad_enabled(active and torch.is_grad_enabled()):
            return self.weights.project(self.taps.run(call).heads.float())

    def _error(self, call: Call, target: Tensor, sinks: Tensor | None) -> Tensor:
        self.trial.sinks = sinks
        found = self._output(call, active=True)
        variance = target.var().clamp_min(torch.finfo(target.dtype).tiny)  # a pruned layer puts out nothing
        return (found - target).square().mean() / variance


def _run(model: PreTrainedModel, row: Tensor) -> None:
    model(**roles_of(model).call(**{words.TOKENS: row[None].to(input_device(model)), words.USE_CACHE: False}))
