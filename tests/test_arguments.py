"""Arguments that make no sense are refused when the patch or the plan is made, and nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap

ROPE: list[dict[str, Any]] = [
    {"kind": "yarn", "beta_fast": "a"},
    {"kind": "yarn", "beta_fast": 1, "beta_slow": 32},
    {"kind": "yarn", "beta_slow": -1},
    {"kind": "yarn", "attention_factor": 0},
    {"kind": "yarn", "long_factor": (1.0,) * 8},
    {"kind": "llama3", "low_freq_factor": 4, "high_freq_factor": 4},
    {"kind": "longrope", "attention_factor": "x"},
    {"kind": "longrope", "attention_factor": -1.0},
    {"kind": "longrope", "long_factor": 2.0},
    {"kind": "longrope", "long_factor": ("a",) * 8},
    {"kind": "longrope", "long_factor": (0.0,) * 8},
    {"kind": "longrope", "long_factor": (math.nan,) * 8},
    {"kind": "linear", "layer_types": ()},
    {"kind": "linear", "layer_types": 3},
    {"kind": "linear", "layer_types": (3,)},
    {"kind": "linear", "layer_types": "full_attention"},
    {"kind": "linear", "factor": math.nan},
    {"kind": "linear", "factor": True},
    {"kind": "linear", "factor": 0.5},
]


@pytest.mark.parametrize("fields", ROPE, ids=str)
def test_a_rope_scaling_that_makes_no_sense_is_no_patch(fields: dict[str, Any]) -> None:
    with pytest.raises(ap.AttnPatchError, match=r"must|belongs to|give a list"):
        ap.RopeScaling(**{"factor": 2.0, **fields})


def test_one_patch_twice_in_one_call_is_a_conflict() -> None:
    model, rope = tiny_model("llama"), ap.RopeScaling(kind="yarn", factor=2.0)
    with pytest.raises(ap.PatchConflict, match="two calls"):
        ap.plan(model, rope, rope)
    with pytest.raises(ap.PatchConflict, match="two calls"):
        ap.plan(model, ap.GroupedQuery(num_kv_heads=2), ap.GroupedQuery(num_kv_heads=4))


@pytest.mark.parametrize(
    ("model_type", "path"), [("opt", "model.decoder.layers.0.self_attn"), ("qwen2", "model.layers.0.self_attn")]
)
def test_what_is_frozen_stays_frozen_parameter_by_parameter(model_type: str, path: str) -> None:
    model = tiny_model(model_type)
    model.get_submodule(path).k_proj.bias.requires_grad_(False)
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2))
    assert not model.get_submodule(path).k_proj.bias.requires_grad
    assert model.get_submodule(path).k_proj.weight.requires_grad


GQA = ap.GroupedQuery(num_kv_heads=2)
IDS = torch.arange(20).view(2, 10) + 5
# what is done with a tiny Llama -> what was found and what is wanted
CALLS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "probe, text": (lambda m: ap.apply(m, GQA, probe="x"), "probe is a str", "mapping of the forward's inputs"),
    "probe, tensor": (lambda m: ap.apply(m, GQA, probe=IDS), "probe is a Tensor", "mapping of the forward's inputs"),
    "probe, empty": (lambda m: ap.apply(m, GQA, probe={}), "probe is empty", "mapping of the forward's inputs"),
    "probe, lists": (lambda m: ap.apply(m, GQA, probe={"input_ids": [[5]]}), r"\['input_ids'\] is a list", "tensor"),
    "probe, nameless": (lambda m: ap.apply(m, GQA, probe={1: IDS}), r"\[1\] is under a int", "under its name"),
    "probe, unused": (lambda m: ap.apply(m, ap.GroupedQuery(num_kv_heads=4), probe="x"), "probe is a str", "mapping"),
    "probe, other names": (
        lambda m: ap.apply(m, GQA, probe={"pixels": IDS}),
        r"on the probe \(pixels\)",
        "inputs it takes",
    ),
    "swapped": (lambda m: ap.apply(GQA, m), "the patch grouped_query stands", "pass the model first"),
    "swapped, plan": (lambda m: ap.plan(GQA, m), "the patch grouped_query stands", "pass the model first"),
    "swapped, patched": (lambda m: ap.patched(GQA, m).__enter__(), "the patch grouped_query stands", "the model first"),
    "a model for a patch": (lambda m: ap.apply(m, m), "argument 1 after the model is a Llama", "pass patches, such as"),
    "no patch": (lambda m: ap.apply(m), "no patch given", "pass at least one"),
    "a list of patches": (
        lambda m: ap.apply(m, [GQA, GQA]),
        "a list of 2",
        r"one by one, as in apply\(model, \*patches",
    ),
    "a patch's class": (lambda m: ap.apply(m, GQA, ap.Flash), "argument 2 .* the class Flash", "pass patches, such as"),
    "a patch's name": (lambda m: ap.apply(m, "flash"), "is 'flash'", "pass patches, such as"),
    "a patch's spec": (lambda m: ap.apply(m, {"patch": "flash"}), "is a mapping", "from_spec"),
    "backend, slash": (lambda m: ap.Flash(backend="/"), "backend '/' does not exist", "owner/name"),
    "backend, no name": (lambda m: ap.Flash(backend="owner/"), "backend 'owner/' does not exist", "owner/name"),
    "backend, path": (lambda m: ap.Flash(backend="a/b/c"), "backend 'a/b/c' does not exist", "owner/name"),
    "backend, spaces": (lambda m: ap.Flash(backend="a b/c d"), "backend 'a b/c d' does not exist", "owner/name"),
    "backend, None": (lambda m: ap.Flash(backend=None), "backend None does not exist", "choose from auto, sdpa"),
    "backend, list": (lambda m: ap.Flash(backend=["sdpa"]), "does not exist", "choose from auto, sdpa"),
    "training, text": (lambda m: ap.Flash(training="yes"), "training is 'yes'", "True, False, or None"),
    "training, number": (lambda m: ap.Flash(training=1), "training is 1", "True, False, or None"),
    "factor, text": (lambda m: ap.RopeScaling(kind="yarn", factor="4"), "factor is '4'", "number of at least 1"),
    "kind, None": (lambda m: ap.RopeScaling(kind=None, factor=4), "kind None does not exist", "choose from: linear"),
    "kind, list": (lambda m: ap.RopeScaling(kind=["yarn"], factor=4), "does not exist", "choose from: linear"),
    "verify, text": (lambda m: ap.verify("x"), "model is 'x'", r"PreTrainedModel, such as hf_attnpatch.load\('x'\)"),
    "verify, inputs": (lambda m: ap.verify(m, inputs="x"), "inputs is a str", "mapping of the forward's inputs"),
    "verify, lists": (lambda m: ap.verify(m, inputs={"input_ids": [[5] * 9] * 2}), "is a list", "tensor"),
    "describe, None": (lambda m: ap.describe(None), "model is a NoneType", "pass a transformers PreTrainedModel"),
    "describe, config": (
        lambda m: ap.describe(m.config),
        "model is a LlamaConfig",
        "pass a transformers PreTrainedModel",
    ),
    "describe, class": (
        lambda m: ap.describe(type(m)),
        "the class LlamaForCausalLM",
        r"LlamaForCausalLM.from_pretrained",
    ),
    "describe, module": (lambda m: ap.describe(torch.nn.Linear(2, 2)), "Linear is not", "pass a transformers"),
    "one-liner, misspelt": (
        lambda m: ap.patch_flash(m, backnd="sdpa"),
        "flash: no field backnd",
        "its fields are: backend",
    ),
    "one-liner, missing": (
        lambda m: ap.patch_rope_scaling(m, kind="yarn"),
        "rope_scaling: factor is missing",
        "or target_length, in tokens",
    ),
    "load, None": (lambda m: ap.load(None), "name is a NoneType", "a folder or the name of a repository"),
    "spec, text": (lambda m: ap.from_spec("flash"), "a str is no patch", "give a mapping"),
    "spec, number": (lambda m: ap.from_spec({"patch": "flash", 3: 4}), "no field 3", "its fields are"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_makes_no_sense_is_named_and_nothing_happens(call: str) -> None:
    do, found, wanted = CALLS[call]
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=rf"{found}.*{wanted}") as error:
        do(model)
    assert len(str(error.value)) < 400
    assert snapshot(model) == before


@pytest.mark.parametrize("backend", ["kernels-community/flash-attn2", "o/n@main", "o/n:f", "o/n@v1.0:f"])
def test_a_repository_may_say_its_revision_and_function(backend: str) -> None:
    assert ap.Flash(backend=backend).backend == backend


def test_a_model_that_is_broken_already_is_not_the_patchs_fault() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ap.AttnPatchError, match="not finite before anything is patched"):
        ap.patch_rope_scaling(model, kind="linear", factor=2.0)
    assert ap.describe(model).rotary[0].rope_type == "default"


def test_weights_that_are_not_there_cannot_be_patched() -> None:
    with pytest.raises(ap.UnsupportedArchitecture, match="no data"):
        ap.apply(tiny_model("llama").to("meta"), ap.GroupedQuery(num_kv_heads=2))
