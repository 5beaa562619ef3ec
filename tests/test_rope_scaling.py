"""The angles that a scaled model computes, against the formulas and against transformers building it so."""

import math

import pytest
import torch
from architectures import tiny_config, tiny_model
from tolerances import FREQUENCIES
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.functional import rotary
from hf_attnpatch.probe import default_inputs, trace

WINDOW, FACTOR, THETA = 64, 4.0, 500_000.0
PLAIN = {"rope_type": "default", "rope_theta": THETA}


def _model(rope=None, model_type="llama", **more):
    return tiny_model(model_type, max_position_embeddings=WINDOW, rope_parameters=dict(rope or PLAIN), **more)


def _frequencies(model):
    return model.model.rotary_emb.inv_freq


def _close(found, wanted, rtol=FREQUENCIES):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


def _logits(model, length=10):
    ids = torch.arange(2 * length).view(2, length) % 90 + 5
    with torch.no_grad():  # not a probe, which puts angles back that a long text has changed
        return model(input_ids=ids, use_cache=False).logits


def _natively(model):
    """Transformers' own model of the patched config with the same weights."""
    twin = AutoModelForCausalLM.from_config(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi", "gpt_neox"])
def test_memory_is_what_transformers_builds_from_the_config(kind, model_type):
    model = tiny_model(model_type, max_position_embeddings=WINDOW)
    ap.patch_rope_scaling(model, kind=kind, factor=FACTOR)
    assert torch.equal(_logits(model, 10), _logits(_natively(model), 10))
    assert torch.equal(_logits(model, 100), _logits(_natively(model), 100))  # beyond the old window


def test_linear_divides_every_angle():
    model = _model()
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="linear", factor=FACTOR)
    _close(_frequencies(model), before / FACTOR)
    assert model.config.max_position_embeddings == WINDOW * FACTOR
    assert model.config.rope_parameters["rope_theta"] == THETA


def test_yarn_keeps_fast_and_divides_slow_angles_and_sharpens():
    model = _model(head_dim=64)
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR, beta_fast=8.0)
    turns = WINDOW * before / (2 * math.pi)
    fast, slow = turns > 10, turns < 0.5
    assert fast.any()
    assert slow.any()
    _close(_frequencies(model)[fast], before[fast])
    _close(_frequencies(model)[slow], before[slow] / FACTOR)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(FACTOR) + 1)


def test_llama3_is_its_formula():
    model = _model(head_dim=64)
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="llama3", factor=FACTOR, low_freq_factor=1.0, high_freq_factor=2.0)
    _close(_frequencies(model), rotary.llama3(before, FACTOR, WINDOW, 1.0, 2.0), rtol=2e-5)


def test_dynamic_changes_nothing_within_the_window():
    model = _model()
    within, beyond = _logits(model, WINDOW), _logits(model, WINDOW + 20)
    ap.patch_rope_scaling(model, kind="dynamic", factor=FACTOR)
    assert model.config.max_position_embeddings == WINDOW  # transformers measures growth against it
    assert torch.equal(_logits(model, WINDOW), within)
    assert not torch.equal(_logits(model, WINDOW + 20), beyond)


def test_longrope_changes_angles_beyond_the_window_only():
    model = _model()
    before = _frequencies(model).clone()
    report = ap.patch_rope_scaling(model, kind="longrope", factor=FACTOR, attention_factor=1.0)
    parameters = model.config.rope_parameters
    assert parameters["original_max_position_embeddings"] == WINDOW
    assert parameters["short_factor"] == pytest.approx([1.0] * len(before))
    _close(before / torch.tensor(parameters["long_factor"]), rotary.by_parts(before, FACTOR, WINDOW))
    report.revert()
    within = _logits(model, WINDOW)
    ap.patch_rope_scaling(model, kind="longrope", factor=FACTOR, attention_factor=1.0)
    torch.testing.assert_close(_logits(model, WINDOW), within, rtol=0, atol=1e-5)


def test_longrope_takes_given_divisors():
    n = len(_frequencies(_model()))
    model = _model()
    before = _frequencies(model).clone()
    long, short = tuple(float(i + 1) for i in range(n)), tuple(1.0 + i / 10 for i in range(n))
    ap.patch_rope_scaling(model, kind="longrope", factor=FACTOR, long_factor=long, short_factor=short)
    _close(_frequencies(model), before / torch.tensor(short))
    _logits(model, WINDOW + 8)
    _close(model.model.rotary_emb.inv_freq, before / torch.tensor(long))


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_twice_the_half_is_the_whole(kind):
    """2 x 2 = 4, from the window that the model was trained on, not from the one it claims by now."""
    once, twice = _model(), _model()
    ap.patch_rope_scaling(once, kind=kind, factor=4.0)
    ap.patch_rope_scaling(twice, kind=kind, factor=2.0)
    ap.patch_rope_scaling(twice, kind=kind, factor=2.0)
    assert twice.config.rope_parameters == once.config.rope_parameters
    assert twice.config.max_position_embeddings == once.config.max_position_embeddings == 4 * WINDOW
    assert torch.equal(_frequencies(twice), _frequencies(once))
    assert torch.equal(_logits(twice), _logits(once))


@pytest.mark.parametrize(
    ("first", "second"),
    [(a, b) for a in ("linear", "yarn", "llama3") for b in ("linear", "yarn", "llama3", "longrope") if a != b],
)
def test_one_kind_on_top_of_another_multiplies_the_angles(first, second):
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind=first, factor=2.0)
    between, attention = _frequencies(model).clone(), model.model.rotary_emb.attention_scaling
    report = ap.patch_rope_scaling(model, kind=second, factor=3.0)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    assert model.config.rope_parameters["rope_theta"] == THETA
    assert f"{first} times {second}, written as longrope" in str(report)
    now = 2 * WINDOW
    wanted = {
        "linear": between / 3.0,
        "yarn": rotary.by_parts(between, 3.0, now),
        "llama3": rotary.llama3(between, 3.0, now),
        "longrope": between,  # it changes what is beyond the present window
    }[second]
    _close(_frequencies(model), wanted, rtol=1e-5)
    if second == "longrope":
        _logits(model, now + 8)
        _close(_frequencies(model), rotary.by_parts(between, 3.0, now), rtol=1e-5)
    sharper = {"yarn": rotary.yarn_attention(3.0), "longrope": rotary.longrope_attention(3.0, now)}.get(second, 1.0)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(attention * sharper)
    assert torch.equal(_logits(model), _logits(_natively(model)))


def test_a_scaling_that_a_checkpoint_brings_is_multiplied():
    brought = {**PLAIN, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = _model({**brought, "original_max_position_embeddings": 16})
    ap.patch_rope_scaling(model, kind="llama3", factor=2.0)
    assert model.config.rope_parameters["factor"] == 16.0
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16
    assert model.config.max_position_embeddings == 2 * WINDOW


@pytest.mark.parametrize(("first", "second"), [("dynamic", "yarn"), ("yarn", "dynamic"), ("longrope", "dynamic")])
def test_what_changes_with_the_length_does_not_multiply(first, second):
    model = _model()
    ap.patch_rope_scaling(model, kind=first, factor=2.0)
    with pytest.raises(ap.AttnPatchError, match=f"has '{first}' scaling, which '{second}' cannot multiply"):
        ap.patch_rope_scaling(model, kind=second, factor=2.0)


def test_only_layers_that_see_the_whole_context_are_scaled():
    model = tiny_model("gemma3_text")
    rope = model.model.rotary_emb
    local, whole = rope.sliding_attention_inv_freq.clone(), rope.full_attention_inv_freq.clone()
    ap.patch_rope_scaling(model, kind="linear", factor=FACTOR)
    assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, local)
    _close(model.model.rotary_emb.full_attention_inv_freq, whole / FACTOR)


def test_layer_types_can_be_chosen():
    model = tiny_model("gemma3_text")
    whole = model.model.rotary_emb.full_attention_inv_freq.clone()
    ap.patch_rope_scaling(model, kind="linear", factor=FACTOR, layer_types=("sliding_attention",))
    assert torch.equal(model.model.rotary_emb.full_attention_inv_freq, whole)
    assert model.config.rope_parameters["sliding_attention"]["factor"] == FACTOR
    with pytest.raises(ap.AttnPatchError, match="layer type 'banana'.*there are: "):
        ap.patch_rope_scaling(model, kind="linear", factor=FACTOR, layer_types=("banana",))


def test_partial_rotation_is_kept():
    model = tiny_model("phi", max_position_embeddings=WINDOW)
    before = model.model.rotary_emb.inv_freq.clone()
    share = model.config.rope_parameters["partial_rotary_factor"]
    assert share < 1
    ap.patch_rope_scaling(model, kind="linear", factor=FACTOR)
    assert model.config.rope_parameters["partial_rotary_factor"] == share
    _close(model.model.rotary_emb.inv_freq, before / FACTOR)


def test_frequencies_stay_in_fp32_when_the_model_is_bf16():
    model = tiny_model("llama", dtype=torch.bfloat16)
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR)
    assert _frequencies(model).dtype == torch.float32
    wanted = tiny_model("llama")
    ap.patch_rope_scaling(wanted, kind="yarn", factor=FACTOR)
    assert torch.equal(_frequencies(model), _frequencies(wanted))


def test_factor_one_touches_nothing_but_divisors_of_ones_own_do():
    model = _model()
    assert not ap.patch_rope_scaling(model, kind="longrope", factor=1.0).changed
    n = len(_frequencies(model))
    assert ap.patch_rope_scaling(model, kind="longrope", factor=1.0, long_factor=(2.0,) * n).changed


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"kind": "banana", "factor": 2},
            "'banana' does not exist; choose from: linear, ntk, ntk_by_parts",
        ),
        ({"kind": "yarn", "factor": 0.5}, "factor is 0.5; .* at least 1"),
        ({"kind": "yarn", "factor": -1}, "factor is -1"),
        ({"kind": "yarn", "factor": float("nan")}, "factor is nan"),
        ({"kind": "yarn", "factor": float("inf")}, "factor is inf"),
        ({"kind": "yarn", "factor": "4"}, "factor is '4'"),
        ({"kind": "yarn", "factor": True}, "factor is True"),
        ({"kind": "yarn", "factor": None}, "factor is missing"),
        ({"kind": None, "factor": 2}, "kind None does not exist"),
    ],
)
def test_arguments_that_will_not_do(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.RopeScaling(**fields)


@pytest.mark.parametrize("name", ["long_factor", "short_factor"])
def test_divisors_must_be_one_for_each_frequency(name):
    with pytest.raises(ap.AttnPatchError, match=f"{name} has 3 numbers; this model rotates 8 frequencies"):
        ap.patch_rope_scaling(_model(), kind="longrope", factor=2.0, **{name: (1.0, 2.0, 3.0)})


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "opt", "bert"])
def test_models_without_rotary_positions_say_what_they_have(model_type):
    with pytest.raises(ap.UnsupportedArchitecture, match=r"needs a rotary module.* positions here are: (table|alibi)"):
        ap.patch_rope_scaling(tiny_model(model_type), kind="yarn", factor=2.0)


def test_the_users_config_objects_are_not_shared_with_the_model():
    config = tiny_config("llama")
    rope = config.rope_parameters
    model = AutoModelForCausalLM.from_config(config)
    ap.patch_rope_scaling(model, kind="yarn", factor=2.0)
    assert rope == {"rope_theta": rope["rope_theta"], "rope_type": "default"}  # replaced, not written into


def test_a_device_and_mode_are_kept():
    model = _model().train()
    ap.patch_rope_scaling(model, kind="linear", factor=2.0)
    assert model.model.rotary_emb.training
    assert torch.isfinite(trace(model, default_inputs(model)).logits).all()
