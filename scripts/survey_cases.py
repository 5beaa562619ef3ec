"""What the survey asks: one function for each patch, from a model to what came of patching it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import readme
import torch
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.invariants import INVARIANTS, Subject
from hf_attnpatch.probe import default_inputs, trace
from hf_attnpatch.verify import FAIL, find

sys.path.insert(0, str(readme.README.parent / "tests"))

from architectures import tiny_inputs
from patches import stock_twin

ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")

Answer = dict[str, Any]


def unpatched(model: PreTrainedModel) -> Answer:
    """What the model breaks by itself."""
    return {"status": "unpatched", "broken": broken(model)}


def grouped_down(model: PreTrainedModel) -> Answer:
    """Half the key-value heads, or one where that is what fits."""
    return patched(model, _halving(model))


def grouped_up(model: PreTrainedModel) -> Answer:
    """From a natively grouped model, which halving gives where the config has a field, to twice as many heads."""
    heads = [site.num_kv_heads for site in ap.describe(model).sites if not site.cross]
    halving = _halving(model)
    if heads and not ap.plan(model, halving).stock:
        return {"status": "not applicable", "detail": "multi-head already: the family has no grouped checkpoints"}
    if heads:
        ap.apply(model, halving)
    return patched(model, ap.GroupedQuery(num_kv_heads=max(heads, default=2)))


def rope(kind: str) -> Callable[[PreTrainedModel], Answer]:
    """Four times the context by this kind of scaling."""
    return lambda model: patched(model, ap.RopeScaling(kind=kind, factor=4.0))


def flash(model: PreTrainedModel) -> Answer:
    """A fused kernel in the place of eager attention, whichever runs on this machine."""
    model.set_attn_implementation("eager")
    return patched(model, ap.Flash())


def by(patch: ap.Patch) -> Callable[[PreTrainedModel], Answer]:
    """This patch, whatever the model."""
    return lambda model: patched(model, patch)


CASES: Mapping[str, Callable[[PreTrainedModel], Answer]] = {
    "unpatched": unpatched,
    "grouped_query down": grouped_down,
    "grouped_query up": grouped_up,
    **{f"rope_scaling {kind}": rope(kind) for kind in ROPE_KINDS},
    "flash": flash,
    "alibi": by(ap.Alibi()),
    "rotary": by(ap.Rotary(theta=500.0)),
    "relative_xl": by(ap.RelativeXl()),
    "sinusoidal": by(ap.Sinusoidal()),
    "position_table": by(ap.PositionTable(length=200)),
    "no_position": by(ap.NoPosition()),
    "score_temperature": by(ap.ScoreTemperature(slope=0.3, step=8)),
    "windowed": by(ap.Windowed(window=6)),
    "self_extend": by(ap.SelfExtend(window=6, group=3, trained=10)),  # the probe has some 24 tokens
    "segment_recurrence": by(ap.SegmentRecurrence(segment_length=8, memory_length=6)),
}


def _halving(model: PreTrainedModel) -> ap.Patch:
    heads = [site.num_kv_heads for site in ap.describe(model).sites if not site.cross]
    return ap.GroupedQuery(num_kv_heads=max(min(heads, default=2) // 2, 1))


def patched(model: PreTrainedModel, patch: ap.Patch) -> Answer:
    """Plans, applies, asks for every invariant and reverts; a refusal to plan is an answer, a later error is not."""
    runs = isinstance(patch, (ap.Flash, ap.Alibi, ap.RelativeXl))  # the model, while they plan
    refusal = ap.UnsupportedArchitecture if runs else ap.AttnPatchError
    try:
        plan = ap.plan(model, patch)
    except refusal as reason:
        return {"status": "not applicable", "detail": " ".join(str(reason).split())}
    if not plan.edits:
        return {"status": "not applicable", "detail": "; ".join(plan.steps[0].proposal.notes)}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    report = ap.apply(model, patch)
    found = {"status": "native" if report.stock else "own type", "broken": broken(model)}
    if found["broken"] and report.stock:
        found["twin"] = broken_by_its_twin(model)
    home = getattr(plan.steps[0].patch, "home", None)
    if home not in (None, "auto"):  # the one that was found
        found["detail"] = f"home: {home}"
    if isinstance(patch, ap.Flash):
        found["detail"] = f"{model.config._attn_implementation} on {model.device.type}"
    report.revert()
    after = model.state_dict()
    same = after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    if not same or model.config.to_dict() != config:
        found["broken"] = {**found["broken"], "revert": "weights or config differ"}
    return found


def broken_by_its_twin(model: PreTrainedModel) -> dict[str, str]:
    """What transformers' own model of the same config and weights breaks; nothing unless it gives the same logits."""
    twin, inputs = stock_twin(model), default_inputs(model)
    same = torch.equal(trace(model, inputs).logits, trace(twin, inputs).logits)
    return broken(twin) if same else {}


ASKED = dict(INVARIANTS)  # `--quick` empties it: a patch is then held to what `apply` checks by itself


def broken(model: PreTrainedModel) -> dict[str, str]:
    """Names of the invariants that the model breaks, with the figure or the error."""
    inputs = tiny_inputs(model)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    subject = Subject(model, ap.describe(model), inputs)
    findings = [find(name, ask, subject) for name, ask in ASKED.items()]
    return {f.invariant: f.note if f.measured is None else f"{f.measured:.2g}" for f in findings if f.outcome == FAIL}
