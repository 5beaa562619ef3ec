"""Which lack a model has for some work, which patch answers it, and what that will not touch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from .anatomy import Anatomy, describe
from .diagnosing.diagnosis import Diagnosis, Lack, Memory, Work, seconds, size
from .diagnosing.prescribe import Bench, Price, prescribe
from .errors import EvaluationError, UnsupportedArchitecture
from .evaluation.hardware import machine_for
from .evaluation.listener import Pass
from .evaluation.machine import Machine
from .evaluation.roofline import Phase, cost
from .probe import input_device

SHARE = 0.25  # of a phase: what takes less is not called a lack
_ADAM = 2  # states for each weight
_ADAM_MOVES = 7  # reads of weight, gradient and both states, writes of all but the gradient


def diagnose(
    model: PreTrainedModel,
    *,
    context: int = 32768,
    batch: int = 8,
    hardware: str | os.PathLike[str] = "auto",
    training: bool = True,
    measure_again: bool = False,
    losses: bool = True,
) -> Diagnosis:
    """Predict what a model costs at some work, name what it lacks, and prescribe the patch.

    Every operation of the model, as it is, is counted on tensors without data, and costed by the rates of a machine;
    so are those of the patched model that is prescribed. Nothing of the model is changed, and weights need not be
    loaded; it is run only on a few tokens, to prove ``Flash`` and to predict what sharing heads loses.

    Args:
        model: a transformers model that reads one sequence; patched or not; in full precision.
        context: tokens in a sequence.
        batch: sequences.
        hardware: ``auto`` measures this machine, as far as it has not been measured yet with as many threads; a name of
            :data:`hf_attnpatch.evaluation.table.TABLE` (``a100``, ``h100``, ``h200``, ``l4``, ``rtx4090``, ``mi300x``,
            ``laptop``); or a YAML or JSON file: see :func:`hf_attnpatch.evaluation.hardware.from_mapping`.
        training: whether to predict a training step (AdamW in the weights' dtype, no recomputation) as well.
        measure_again: whether ``auto`` forgets what it measured before.
        losses: whether to predict what sharing key-value heads loses, for each number of them: the model is run on
            random tokens for that, where its weights are in memory.

    Raises:
        UnsupportedArchitecture: no transformers model, or a quantized one.
        EvaluationError: no such numbers or hardware, or a model that cannot be followed without data.
    """
    anatomy = describe(model)
    _check(model, anatomy, context, batch)
    device = input_device(model)
    bench = Bench(model, anatomy, batch, context, training, losses)
    own = bench.passes(model)
    machine = machine_for(os.fspath(hardware), list(own.values()), device, again=measure_again)

    def price(passes: dict[str, Pass], priced: PreTrainedModel) -> Work:
        known = machine_for("auto", list(passes.values()), device) if hardware == "auto" else machine
        return work(passes, known, priced)

    return _written_up(bench, machine, price(own, model), price)


def _written_up(bench: Bench, machine: Machine, now: Work, price: Price) -> Diagnosis:
    bench = replace(bench, memory_bytes=machine.memory_bytes)
    lacks = tuple(_lacks(bench.anatomy, now, machine, bench.context))
    answers = prescribe(bench, now, lacks, price)
    return Diagnosis(
        model=bench.anatomy.architecture,
        hardware=machine.name,
        source=machine.source,
        context=bench.context,
        batch=bench.batch,
        dtype=str(bench.model.dtype).removeprefix("torch."),
        work=now,
        lacks=lacks,
        prescriptions=tuple(answers.prescriptions),
        declined=tuple(answers.declined),
        notes=tuple(_notes(bench, bench.anatomy)),
    )


def _check(model: PreTrainedModel, anatomy: Anatomy, context: int, batch: int) -> None:
    for name, given in (("context", context), ("batch", batch)):
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise EvaluationError(f"diagnose: {name} is {given!r}; it must be a whole number above 0.")
    if getattr(model, "hf_quantizer", None) is not None or not all(p.is_floating_point() for p in model.parameters()):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture} is quantized: its products run in kernels that are not costed here; diagnose the "
            "full-precision model, and measure the quantized one with hf_attnpatch.evaluation.decoding."
        )


def work(passes: dict[str, Pass], machine: Machine, model: Any) -> Work:
    """Cost the passes of a model, and say what holds memory in each."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())  # tied ones come once
    cache = passes["decode"].cache_bytes if "decode" in passes else 0
    phases: dict[str, Phase] = {}
    memory: dict[str, Memory] = {}
    for name, each in passes.items():
        phases[name] = cost(machine, each)
        states = (1 + _ADAM) * weights if name == "train" else 0
        own = each.cache_bytes
        activations = max(each.peak_bytes - own - (weights if name == "train" else 0), 0)  # gradients are in the peak
        memory[name] = Memory(weights, own, states, activations)
    if "train" in phases:
        phases["train"] = _with_optimizer(phases["train"], machine, weights, model)
    return Work(phases, memory, cache)


def _with_optimizer(phase: Phase, machine: Machine, weights: int, model: Any) -> Phase:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    step = machine.moving(_ADAM_MOVES * weights, dtype)
    parts = {**phase.parts, "weights": phase.parts["weights"] + step}
    return Phase.from_dict({**phase.to_dict(), "parts": list(parts.items()), "seconds": phase.seconds + step})


def _lacks(anatomy: Anatomy, now: Work, machine: Machine, context: int) -> Sequence[Lack]:
    found = []
    longest = min([anatomy.max_positions or context, *anatomy.tables.values()])
    if context > longest and (anatomy.rotary or anatomy.tables):
        what = f"{context} tokens are asked for, positions are trained up to {longest}"
        found.append(Lack("context", "", f"{what} ({anatomy.positions})"))
    decode = now.phases.get("decode")
    if decode is not None:
        share = (decode.parts["cache"] + decode.parts["attention"]) / decode.seconds
        if share >= SHARE or now.cache_bytes > now.memory["decode"].weights:
            what = f"a token waits {share:.0%} of {seconds(decode.seconds)} for keys and values"
            held = f"which hold {size(now.cache_bytes)} beside {size(now.memory['decode'].weights)} of weights"
            found.append(Lack("cache", "decode", f"{what}, {held}"))
    for name in ("prefill", "train"):
        phase = now.phases.get(name)
        if phase is not None and phase.parts["attention"] >= SHARE * phase.seconds:
            what = f"attention is {phase.parts['attention'] / phase.seconds:.0%} of {seconds(phase.seconds)}"
            found.append(Lack("attention", name, f"in {name}, {what}"))
    for name, memory in now.memory.items():
        if 0 < machine.memory_bytes < memory.total:
            what = f"{name} holds {size(memory.total)} at its peak, the machine has {size(machine.memory_bytes)}"
            found.append(Lack("memory", name, what))
    return found


def _notes(bench: Bench, anatomy: Anatomy) -> Sequence[str]:
    notes = list(bench.left_out)
    if not bench.decodes:
        notes.append("no decoding: the model keeps no keys and values of earlier tokens")
    first = {why: path for path, why in reversed({**anatomy.unread, **anatomy.other}.items())}
    notes += [f"{path}: {why}; no patch here changes it" for why, path in first.items()]
    return notes
