"""LongRoPE's search for a divisor of each rotary frequency by the loss on long text (2402.13753, section 3.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..anatomy import describe
from ..api import apply
from ..errors import AttnPatchError
from ..evaluation.logits import token_losses
from ..evaluation.losses import check_finite
from ..evaluation.mode import device_of, measuring
from ..evaluation.windows import Documents, read_documents
from ..patches import RopeScaling
from ..showing import Shown
from ..upstream import words
from .course import Course
from .evolution import Divisors, rounded, seeds
from .state import opened


@dataclass(frozen=True)
class RopeSearch(Shown):
    """The result of a search.

    Attributes:
        patch: the scaling, to be applied to the model.
        loss: of the last targets of the documents, nats per token.
        seeds: losses of position interpolation, NTK and YaRN, with which the search began.
        evaluations: number of evaluated divisors.
        population: size of the population.
        iterations: number of iterations.
        seconds: duration of this call.
    """

    patch: RopeScaling
    loss: float
    seeds: dict[str, float]
    evaluations: int
    population: int
    iterations: int
    seconds: float

    def __str__(self) -> str:
        rows = [*self.seeds.items(), ("found", self.loss)]
        lines = (f"{name:>10}  {loss:.4f} nats per token" for name, loss in rows)
        how = f"population {self.population}, {self.iterations} iterations, {self.seconds:.0f} s"
        return "\n".join([f"{self.evaluations} sets of divisors tried ({how})", *lines])


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The size of the search.

    Attributes:
        population: divisors that are kept; an iteration makes a quarter as many mutations and as many crossovers.
        iterations: at most.
        minutes: scales population and iterations down to this time, by that of the seeds; None does not.
        step: of the grid of divisors, which reaches 1.25 times target over trained length.
        seed: of the random numbers; equal seeds find equal divisors.
    """

    population: int = 64  # the paper's
    iterations: int = 40
    minutes: float | None = None
    step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.population < 8 or self.iterations < 1:
            raise AttnPatchError(
                f"population {self.population}, iterations {self.iterations}: wanted at least 8 and 1."
            )
        if self.step <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise AttnPatchError(f"step {self.step}, minutes {self.minutes}: wanted numbers above 0.")


def search_rope(
    model: PreTrainedModel,
    *,
    target: int,
    documents: Documents,
    targets: int | None = None,
    attention_factor: float | None = None,
    state: str | Path | None = None,
    batch_tokens: int = 8192,
    **effort: Any,
) -> RopeSearch:
    """Search the divisors of rotary frequencies with which a model reads longer text best; the model is unchanged.

    Experimental: its arguments may get other names or defaults between minor versions.

    The seeds are position interpolation, NTK, YaRN and transformers' own YaRN (a ramp over indices instead of turns);
    children are mutations and crossovers that divide no frequency by less than a higher one. Apply ``.patch`` of the
    result: stock transformers loads it as ``longrope``. Judge it on other text. The paper's first tokens with unchanged
    angles are left out, because transformers cannot express them.

    Args:
        model: a causal language model with rotary positions.
        target: context in tokens, above the one that it was trained on.
        documents: token ids, each at least ``target`` long; a mapping gives them names.
        targets: how many of the last tokens of ``target`` are predicted; None for half of them.
        attention_factor: on cos and sin; None takes LongRoPE's or YaRN's, whichever gives the lower loss with YaRN's
            divisors.
        state: a file, written after each evaluation; if it exists, the search continues from it.
        batch_tokens: largest number of tokens in a forward pass; at least one document.
        effort: fields of :class:`Effort`: ``population``, ``iterations``, ``minutes``, ``step``, ``seed``.

    Raises:
        AttnPatchError: no rotary positions, a target that is not longer, invalid numbers, or a state file of another
            search.
        EvaluationError: a document is too short, or a loss is not finite.
    """
    targets = target // 2 if targets is None else targets
    factor = target / _trained(model, target, targets)
    ids = torch.stack([text[:target] for text in read_documents(documents, target).values()])
    task = _Task(model, ids, targets, factor, attention_factor, max(1, batch_tokens // target))
    made, file = Effort(**effort), None if state is None else Path(state)
    start = seeds(_frequencies(model), factor, round(target / factor))
    start["yarn of transformers"] = _native(model, factor)
    if attention_factor is None and (file is None or not file.exists()):  # else the resumed search's
        task = dataclasses.replace(task, attention=_attention(task, start["yarn of transformers"]))
    return _searched(task, start, made, file)


@dataclass(frozen=True)
class _Task:
    """What divisors are evaluated on.

    Attributes:
        model: to be scaled.
        ids: windows of text, shape (documents, target), int64.
        targets: last tokens that are predicted.
        factor: target over trained length.
        attention: factor on cos and sin, or None.
        rows: windows in a forward.
    """

    model: PreTrainedModel
    ids: torch.Tensor
    targets: int
    factor: float
    attention: float | None
    rows: int

    def scaling(self, divisors: Divisors) -> RopeScaling:
        """Return the patch for these divisors."""
        fields: dict[str, Any] = {"long_factor": divisors, "attention_factor": self.attention}
        return RopeScaling(kind="longrope", factor=self.factor, **fields)

    def loss(self, divisors: Divisors) -> float:
        """Return the loss with these divisors, in nats per token."""
        report = apply(self.model, self.scaling(divisors), self_check=False)
        try:
            return _loss(self.model, self.ids, self.targets, self.rows)
        finally:
            report.revert()


def _attention(task: _Task, divisors: Divisors) -> float:
    """Return LongRoPE's or YaRN's factor on cos and sin, whichever gives the lower loss with these divisors."""
    trained = task.ids.shape[1] / task.factor
    choices = (math.sqrt(1 + math.log(task.factor) / math.log(trained)), 0.1 * math.log(task.factor) + 1)
    return min(choices, key=lambda each: dataclasses.replace(task, attention=each).loss(divisors))


def _native(model: PreTrainedModel, factor: float) -> Divisors:
    """Return the divisors of transformers' own YaRN."""
    plain = _frequencies(model)
    report = apply(model, RopeScaling(kind="yarn", factor=factor), self_check=False)
    try:
        return rounded((plain.double() / _frequencies(model).double()).tolist())
    finally:
        report.revert()


def _searched(task: _Task, start: dict[str, Divisors], effort: Effort, file: Path | None) -> RopeSearch:
    begin, target = time.monotonic(), task.ids.shape[1]
    settings = _settings(task.model, task.ids, target=target, targets=task.targets, step=effort.step, seed=effort.seed)
    settings["attention_factor"] = task.attention
    settings["asked"] = [effort.population, effort.iterations, effort.minutes]
    kept = opened(settings, effort.seed, file)
    task = dataclasses.replace(task, attention=kept.settings["attention_factor"])
    search = Course(kept, task.loss, list(start.values()), effort.step, 1.25 * task.factor)
    search.size(effort.population, effort.iterations, effort.minutes)
    best = search.run()
    return RopeSearch(
        patch=task.scaling(best),
        loss=kept.losses[best],
        seeds={name: kept.losses[divisors] for name, divisors in start.items()},
        evaluations=len(kept.losses),
        population=kept.settings["population"],
        iterations=kept.settings["iterations"],
        seconds=time.monotonic() - begin,
    )


def _frequencies(model: PreTrainedModel) -> torch.Tensor:
    """Return the rotary frequencies that ``longrope`` divides, fp32, on the CPU."""
    module = model.get_submodule(describe(model).rotary[0].path)
    named = dict(module.named_buffers(recurse=False))
    name = next(n for n in named if n.endswith(words.ORIGINAL_FREQUENCIES) and "sliding" not in n)
    found: torch.Tensor = named[name].detach().to("cpu", torch.float32)
    return found


def _loss(model: PreTrainedModel, ids: torch.Tensor, targets: int, rows: int) -> float:
    """Return the mean loss of the last targets of windows, (documents, target), in nats, ``rows`` at a time."""
    found = []
    with measuring(model):
        for part in torch.split(ids.to(device_of(model)), rows):
            found.append(token_losses(model, part, part[:, -targets:]).double().cpu())
    losses = torch.cat(found)
    for number, row in enumerate(losses):
        check_finite(row, f"document {number}", ids.shape[1])
    return float(losses.mean())


def _settings(model: PreTrainedModel, ids: torch.Tensor, **numbers: Any) -> dict[str, Any]:
    digest = hashlib.sha256(ids.numpy().tobytes())
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return {**numbers, "text": digest.hexdigest()[:16], "model": hashlib.sha256(config.encode()).hexdigest()[:16]}


def _trained(model: PreTrainedModel, target: int, targets: int) -> int:
    """Return the trained window.

    Raises:
        AttnPatchError: the positions cannot be scaled, or the numbers are invalid.
    """
    anatomy = describe(model)
    trained = anatomy.max_positions
    if not anatomy.rotary or not isinstance(trained, int):
        raise AttnPatchError(f"{anatomy.architecture}: positions are {anatomy.positions}; there is nothing to search.")
    if not isinstance(target, int) or target <= trained:
        raise AttnPatchError(f"target is {target!r}; the model reads {trained} tokens already, wanted more.")
    if not 1 <= targets < target:
        raise AttnPatchError(f"targets is {targets!r}; wanted 1 to {target - 1}, which leaves a token to read.")
    return trained


__all__ = ["RopeSearch", "search_rope"]
