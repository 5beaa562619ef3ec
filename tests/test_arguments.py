"""Arguments that make no sense are refused when the patch or the plan is made, and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import tiny_model

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


def test_a_probe_is_a_mapping() -> None:
    with pytest.raises(ap.AttnPatchError, match="mapping"):
        ap.apply(tiny_model("llama"), ap.GroupedQuery(num_kv_heads=2), probe=torch.ones(2, 3))  # type: ignore[arg-type]


def test_weights_that_are_not_there_cannot_be_patched() -> None:
    with pytest.raises(ap.UnsupportedArchitecture, match="no data"):
        ap.apply(tiny_model("llama").to("meta"), ap.GroupedQuery(num_kv_heads=2))
