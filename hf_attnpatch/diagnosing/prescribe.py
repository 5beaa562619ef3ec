"""Finds the patch that answers a lack, if one exists and applies, and its predicted gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from ..anatomy import Anatomy, Site, describe
from ..errors import AttnPatchError, EvaluationError
from ..evaluation.listener import PARTS, Pass
from ..evaluation.operations import Phantom, without_data
from ..heads.group_size import predict
from ..patch import Patch
from ..patches import Flash, GroupedQuery, RopeScaling
from ..plan import Plan, plan
from .diagnosis import Lack, Prescription, Setting, Work, seconds

ENOUGH = 0.25  # of the memory of a phase: what keys and values may take
MOST = 0.5  # of a decoding step: what takes less is no bottleneck
_WORTH = 1.05  # a factor below this is not worth a change of the model
_SEEN = 0.01  # of a phase: smaller parts are not worth a word
_STAYS = 0.95  # a part that keeps so much of its time is not touched

Price = Callable[[dict[str, Pass], PreTrainedModel], Work]


@dataclass
class Bench:
    """A model and its work: what it computes, and what it would compute with patches.

    Attributes:
        model: as it is.
        anatomy: of it.
        batch: sequences.
        context: tokens in each.
        training: whether training is asked about.
        losses: whether to predict what merging heads loses, where the weights are at hand.
        memory_bytes: of the machine; 0 where not known.
        decodes: whether it keeps keys and values; false once it has been seen that it does not.
        left_out: sentences on what could not be followed.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    batch: int
    context: int
    training: bool
    losses: bool = True
    memory_bytes: int = 0
    decodes: bool = True
    left_out: list[str] = field(default_factory=list)

    def passes(self, model: PreTrainedModel) -> dict[str, Pass]:
        """Return the passes of a model, phase by phase.

        Raises:
            EvaluationError: not even a forward can be followed.
        """
        phantom, found = Phantom(model), {}
        if phantom.decodes:
            found["prefill"], found["decode"] = phantom.decode(self.batch, self.context)
        if not phantom.decodes or not found["decode"].cache_bytes:
            self.decodes = False
            found = {"prefill": phantom.forward(self.batch, self.context)}
        if self.training:
            try:
                found["train"] = phantom.training(self.batch, self.context)
            except EvaluationError as error:
                self.left_out += [f"no training: {error}"] * (model is self.model)
        return found

    def patched(self, steps: Plan, patch: Patch) -> PreTrainedModel:
        """Return a patched copy without data."""
        copy: Any = without_data(self.model)
        made = steps.steps[0].patch
        # a kernel was proved on the model itself; new weights take the cheapest method, whose shapes are the same
        edits = steps.edits if isinstance(patch, Flash) else made.structure().propose(copy, describe(copy)).edits
        for edit in edits:
            edit.run(copy)
        return copy


@dataclass
class Answers:
    """The prescriptions, and the reasons where there are none."""

    prescriptions: list[Prescription] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)


def prescribe(bench: Bench, now: Work, lacks: Sequence[Lack], price: Price) -> Answers:
    """Return a prescription for each kind of lack, or the reason why there is none."""
    answers = Answers()
    for lack in reversed({lack.kind: lack for lack in reversed(lacks)}.values()):  # the first of each kind
        try:
            made = _FOR[lack.kind](bench, now, price, lack)
        except AttnPatchError as error:
            answers.declined.append(f"{lack.kind}: {error}")
            continue
        if isinstance(made, str):
            answers.declined.append(made)
        elif made.code not in {each.code for each in answers.prescriptions}:
            answers.prescriptions.append(made)
    return answers


def _context(bench: Bench, now: Work, price: Price, lack: Lack) -> Prescription:
    longest = bench.anatomy.max_positions or bench.context
    factor = float(2 ** math.ceil(math.log2(bench.context / longest)))
    reasons: list[str] = []
    for kind in ("yarn", "llama3", "linear", "longrope", "dynamic"):
        patch = RopeScaling(kind=kind, factor=factor)
        try:
            steps = plan(bench.model, patch)
        except AttnPatchError as error:
            reasons.append(str(error))
            continue
        said = (
            f"quality beyond {longest} tokens is not predicted: measure it (hf_attnpatch.evaluation.perplexity)",
            "time and memory stay what they are at this length",
        )
        return _made("context", bench, patch, steps, now, now, said)
    raise AttnPatchError(reasons[0])


def _cache(bench: Bench, now: Work, price: Price, lack: Lack) -> Prescription | str:
    """Return the mildest number of shared heads that removes the lack, with all useful ones; else the mildest."""
    sites = [s for s in bench.anatomy.sites if not s.cross and not s.tower]
    tried: list[tuple[GroupedQuery, Plan, Work, bool]] = []
    last = now.phases["decode"].seconds
    for count in _counts(sites):
        patch = GroupedQuery(num_kv_heads=count)
        planned = plan(bench.model, _shape(bench, patch))
        copy = bench.patched(planned, patch)
        after = price(bench.passes(copy), copy)
        if tried and last < _WORTH * after.phases["decode"].seconds:
            break
        tried.append((patch, planned, after, _lifted(bench, lack, after)))
        last = after.phases["decode"].seconds
    if not tried:
        return "cache: every layer has one key-value head already, or none of its own"
    patch, planned, after, lifts = next((each for each in tried if each[-1]), tried[0])
    said = ["the model changes: merged heads lose quality; give calibration= and tokenizer=, look at report.damage"]
    said += [] if lifts else ["what is lacking stays: no setting lifts it; this is the mildest"]
    lost = _lost(bench, sites, [p.num_kv_heads for p, *_ in tried if isinstance(p.num_kv_heads, int)])
    settings = [
        Setting(_spec(p), dict(_gains(now, work)), lost.get(p.num_kv_heads), lifted) for p, _, work, lifted in tried
    ]
    made = _made("cache", bench, patch, planned, now, after, said)
    return replace(made, settings=tuple(settings))


def _shape(bench: Bench, patch: GroupedQuery) -> GroupedQuery:
    """Return a patch with the same shapes that needs no weights; the method of merging costs nothing later."""
    return patch if all(not p.is_meta for p in bench.model.parameters()) else replace(patch, method="mean")


def _lifted(bench: Bench, lack: Lack, after: Work) -> bool:
    """Return whether a lack is removed: the work fits, or keys and values no longer take most of a step."""
    if lack.kind == "memory":
        return after.memory[lack.where].total <= bench.memory_bytes
    step = after.phases["decode"]
    return step.parts["cache"] + step.parts["attention"] < MOST * step.seconds


def _lost(bench: Bench, sites: Sequence[Site], counts: Sequence[int]) -> Mapping[int | str, float]:
    """Return the share of energy that merging loses, by number of heads, predicted from the weights if present."""
    if not bench.losses or any(p.is_meta for p in bench.model.parameters()):
        return {}
    try:
        return dict[int | str, float](predict(bench.model, sites, counts, None, None).items())
    except AttnPatchError as error:
        bench.left_out.append(f"no prediction of what merging heads loses: {error}")
        return {}


def _counts(sites: Sequence[Site]) -> list[int]:
    """Return the numbers of key-value heads that all sites can have, largest first."""
    fits = [{n for n in range(1, s.num_kv_heads) if s.num_kv_heads % n == 0} for s in sites]
    return sorted(set.intersection(*fits), reverse=True) if fits else []


def _attention(bench: Bench, now: Work, price: Price, lack: Lack) -> Prescription | str:
    present = bench.model.config._attn_implementation
    if present != "eager":
        return f"attention: {present} is a fused kernel already; what it takes grows with the square of the context"
    if any(p.is_meta for p in bench.model.parameters()):
        return "attention: it is eager; a fused kernel is proved on the model's weights, which are not loaded here"
    patch = Flash(backend="auto", training=bench.training)
    steps = plan(bench.model, patch)
    if not steps.edits:
        return f"attention: {steps.steps[0].proposal.notes[0]}"
    copy = bench.patched(steps, patch)
    said = ("the cache, and the arithmetic of scores, which grows with the square of the context",)
    return _made("attention", bench, patch, steps, now, price(bench.passes(copy), copy), said)


def _memory(bench: Bench, now: Work, price: Price, lack: Lack) -> Prescription | str:
    if bench.model.config._attn_implementation == "eager":
        return _attention(bench, now, price, lack)
    held = now.memory[lack.where]
    if held.cache >= ENOUGH * held.total:
        return _cache(bench, now, price, lack)
    return "memory: weights, gradients and activations hold it; a smaller batch, recomputation or more machines"


_FOR: dict[str, Callable[[Bench, Work, Price, Lack], Prescription | str]] = {
    **{"context": _context, "cache": _cache, "attention": _attention, "memory": _memory}
}


def _made(
    answers: str, bench: Bench, patch: Patch, steps: Plan, now: Work, after: Work, said: Sequence[str]
) -> Prescription:
    fields = _chosen(patch)
    code = f"hf_attnpatch.patch_{patch.name}(model, {', '.join(f'{k}={v!r}' for k, v in fields.items())})"
    proposal = steps.steps[0].proposal
    left = [note for note in proposal.notes if note.startswith("left alone")]
    return Prescription(
        answers=answers,
        code=code,
        command=f"attnpatch apply MODEL OUT --patch {_spec(patch)}",
        gains=dict(_gains(now, after)),
        after=after,
        untouched=(*said, *(_staying(now, after) if after is not now else ()), *left),
        stock=steps.stock,
    )


def _chosen(patch: Patch) -> dict[str, Any]:
    return {k: v for k, v in patch.to_record().items() if k != "patch" and v != _default(patch, k)}


def _spec(patch: Patch) -> str:
    return f"{patch.name}:{','.join(f'{k}={v}' for k, v in _chosen(patch).items())}".rstrip(":")


def _default(patch: Patch, name: str) -> Any:
    return type(patch).__dataclass_fields__[name].default


def _gains(now: Work, after: Work) -> Iterator[tuple[str, float]]:
    """Yield what shrinks by a relevant factor."""
    pairs = [(f"{n} seconds", now.phases[n].seconds, after.phases[n].seconds) for n in now.phases]
    pairs += [(f"{n} memory", now.memory[n].total, after.memory[n].total) for n in now.phases]
    pairs += [("cache bytes", now.cache_bytes, after.cache_bytes)] if now.cache_bytes else []
    yield from ((what, old / new) for what, old, new in pairs if old > _WORTH * new)


def _staying(now: Work, after: Work) -> Iterator[str]:
    """Yield the parts that take as long with the patch as before."""
    for name, phase in now.phases.items():
        same = [
            p
            for p in PARTS
            if after.phases[name].parts[p] >= _STAYS * phase.parts[p] and phase.parts[p] >= _SEEN * phase.seconds
        ]
        taken = ", ".join(f"{p} {seconds(phase.parts[p])}" for p in same)
        if same:
            yield f"of {seconds(phase.seconds)} in {name}: {taken}"


__all__ = ["Answers", "Bench", "prescribe"]
