"""Rope kinds that transformers has no name for, written so that it computes them; and faults of its own around rope."""

import copy
import math

import pytest
import torch
from architectures import tiny_config, tiny_model
from tolerances import FREQUENCIES
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.functional import rotary
from hf_attnpatch.probe import trace

WINDOW, FACTOR, THETA = 64, 4.0, 10_000.0
PLAIN = {"rope_type": "default", "rope_theta": THETA}
NEW = ("ntk", "ntk_by_parts", "resonance", "clipped")


def _model(rope=None, model_type="llama", **more):
    return tiny_model(model_type, max_position_embeddings=WINDOW, rope_parameters=dict(rope or PLAIN), **more)


def _frequencies(model):
    return model.model.rotary_emb.inv_freq


def _close(found, wanted, rtol=FREQUENCIES):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


def _logits(model, length=10):
    ids = torch.arange(2 * length).view(2, length) % 90 + 5
    return trace(model, {"input_ids": ids}).logits


def _natively(model):
    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi", "phi3", "gpt_neox"])
def test_stock_transformers_loads_them_bit_equal(kind, model_type, tmp_path):
    model = tiny_model(model_type, max_position_embeddings=WINDOW)
    before = _logits(model, 100)
    report = ap.patch_rope_scaling(model, kind=kind, factor=FACTOR)
    assert report.stock
    assert model.config.max_position_embeddings == FACTOR * WINDOW
    assert not torch.equal(_logits(model, 100), before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    for length in (10, 100):
        assert torch.equal(_logits(loaded, length), _logits(model, length))
    report.revert()
    assert torch.equal(_logits(model, 100), before)


def test_ntk_is_another_base_and_nothing_else():
    model = _model(head_dim=64)
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="ntk", factor=FACTOR)
    assert model.config.rope_parameters == {**PLAIN, "rope_theta": pytest.approx(THETA * FACTOR ** (64 / 62))}
    _close(_frequencies(model), before * FACTOR ** (-2 * torch.arange(32) / 62))
    _close(_frequencies(model)[-1], before[-1] / FACTOR)
    assert _frequencies(model)[0] == before[0]


def test_ntk_takes_the_share_of_the_head_that_is_rotated():
    model = tiny_model("phi", max_position_embeddings=WINDOW)
    rotated = 2 * len(_frequencies(model))
    assert rotated < model.config.hidden_size // model.config.num_attention_heads
    theta = model.config.rope_parameters["rope_theta"]
    ap.patch_rope_scaling(model, kind="ntk", factor=FACTOR)
    assert model.config.rope_parameters["rope_theta"] == pytest.approx(theta * FACTOR ** (rotated / (rotated - 2)))


def test_ntk_needs_frequencies_to_spread_over():
    with pytest.raises(ap.AttnPatchError, match="rotates only one"):
        ap.patch_rope_scaling(_model(head_dim=2), kind="ntk", factor=2.0)


def test_ntk_by_parts_is_yarn_without_its_factor_on_cos_and_sin():
    parts, yarn = _model(head_dim=64), _model(head_dim=64)
    ap.patch_rope_scaling(parts, kind="ntk_by_parts", factor=FACTOR)
    ap.patch_rope_scaling(yarn, kind="yarn", factor=FACTOR)
    assert torch.equal(_frequencies(parts), _frequencies(yarn))
    assert parts.model.rotary_emb.attention_scaling == 1.0
    assert parts.config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_the_formula_of_its_code(truncate):
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR, truncate=truncate)
    _close(_frequencies(model), rotary.yarn(THETA, 64, FACTOR, WINDOW, truncate=truncate))


def test_resonance_rounds_the_wavelengths_below_the_window():
    model = _model(head_dim=64)
    before = 2 * math.pi / _frequencies(model)
    ap.patch_rope_scaling(model, kind="resonance", factor=1.0)
    after, short = 2 * math.pi / _frequencies(model), before < WINDOW
    assert 0 < short.sum() < len(before)
    _close(after[short], before[short].round())
    _close(after[~short], before[~short])
    assert (before[short] - before[short].round()).abs().max() > 0.1


def test_resonance_yarn_is_one_on_top_of_the_other():
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR)
    yarn, attention = _frequencies(model).clone(), model.model.rotary_emb.attention_scaling
    ap.patch_rope_scaling(model, kind="resonance", factor=1.0)
    _close(_frequencies(model), rotary.resonance(yarn, WINDOW))  # of the trained window, not of the present one
    assert model.model.rotary_emb.attention_scaling == pytest.approx(attention)
    assert model.config.max_position_embeddings == FACTOR * WINDOW


def test_clipped_tapers_the_lowest_frequencies_to_zero():
    model = _model(head_dim=128)
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="clipped", factor=1.0)
    taper = 0.5 * (1 + torch.linspace(0, math.pi, 20).cos())  # as the paper's code has it, 20 of 64
    _close(_frequencies(model)[:-1], (before * torch.cat([torch.ones(44), taper]))[:-1], rtol=1e-4)
    angle = _frequencies(model)[-1] * 1e7
    assert angle < 1e-20
    assert torch.cos(angle) == 1
    assert torch.isfinite(torch.tensor(model.config.rope_parameters["long_factor"])).all()


@pytest.mark.parametrize(("size", "given", "count"), [(128, None, 20), (64, None, 10), (16, None, 2), (64, 5, 5)])
def test_clipped_takes_the_papers_share_or_a_number(size, given, count):
    model = _model(head_dim=size)
    before = _frequencies(model).clone()
    ap.patch_rope_scaling(model, kind="clipped", factor=1.0, clip_frequencies=given)
    kept = torch.isclose(_frequencies(model), before, rtol=1e-6)
    assert kept.sum() == size // 2 - count + 1  # the taper begins with 1


@pytest.mark.parametrize("second", NEW)
@pytest.mark.parametrize("first", ["linear", "ntk", "ntk_by_parts", "yarn", "llama3"])
def test_a_static_kind_multiplies_what_is_there(first, second):
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind=first, factor=2.0)
    between, attention = _frequencies(model).clone(), model.model.rotary_emb.attention_scaling
    ap.patch_rope_scaling(model, kind=second, factor=3.0)
    now = 2 * WINDOW
    trained = now if first in ("linear", "ntk") else WINDOW  # what the config tells
    wanted = {
        "ntk": rotary.ntk(between, 3.0),
        "ntk_by_parts": rotary.by_parts(between, 3.0, now),
        "resonance": rotary.resonance(between, trained),
        "clipped": rotary.clipped(between, 10).clamp_min(1e-37),
    }[second]
    if (first, second) == ("ntk_by_parts", "ntk_by_parts"):
        wanted = rotary.yarn(THETA, 64, 6.0, WINDOW)
    if (first, second) == ("ntk", "ntk_by_parts"):
        wanted = rotary.yarn(model.config.rope_parameters["rope_theta"], 64, 3.0, now)
    torch.testing.assert_close(_frequencies(model), wanted, rtol=1e-5, atol=1e-30)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(attention)
    assert torch.equal(_logits(model, 100), _logits(_natively(model), 100))


@pytest.mark.parametrize("kind", ["linear", "yarn", "resonance"])
def test_what_a_longrope_checkpoint_does_beyond_its_window_is_multiplied_too(kind):
    """Each of its two lists of divisors by itself, and the switch stays where it is."""
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind="longrope", factor=2.0, attention_factor=1.0)
    old = dict(model.config.rope_parameters)
    ap.patch_rope_scaling(model, kind=kind, factor=2.0)
    new, unscaled = model.config.rope_parameters, rotary.default(THETA, 64)
    assert new["original_max_position_embeddings"] == WINDOW
    for name in ("short_factor", "long_factor"):
        frequencies = unscaled / torch.tensor(old[name])
        wanted = {
            "linear": frequencies / 2,
            "yarn": rotary.by_parts(frequencies, 2.0, 2 * WINDOW),
            "resonance": rotary.resonance(frequencies, WINDOW),
        }[kind]
        _close(unscaled / torch.tensor(new[name]), wanted, rtol=1e-5)
    assert model.config.max_position_embeddings == 4 * WINDOW


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "linear", "attention_factor": 1.2}, "attention_factor belongs to kind=yarn"),
        ({"kind": "ntk_by_parts", "attention_factor": 1.2}, "attention_factor belongs to kind=yarn"),
        ({"kind": "linear", "truncate": False}, "truncate belongs to kind=yarn"),
        ({"kind": "yarn", "truncate": "no"}, "truncate is 'no'; it must be True or False"),
        ({"kind": "yarn", "clip_frequencies": 4}, "clip_frequencies belongs to kind=clipped"),
        ({"kind": "clipped", "clip_frequencies": 1}, "clip_frequencies is 1; .* at least 2"),
        ({"kind": "clipped", "clip_frequencies": True}, "clip_frequencies is True"),
        ({"kind": "clipped", "clip_frequencies": 2.0}, "clip_frequencies is 2.0"),
    ],
)
def test_fields_that_will_not_do(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.RopeScaling(factor=2.0, **fields)


def test_more_tapered_than_there_are():
    with pytest.raises(ap.AttnPatchError, match="clip_frequencies is 9; this model rotates 8"):
        ap.patch_rope_scaling(_model(), kind="clipped", factor=1.0, clip_frequencies=9)


# -- faults of transformers: each fails on stock and passes patched ---------------------------------------------------


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_a_raised_maximum_is_not_taken_for_the_trained_window(kind):
    """Upstream takes the maximum, which is the raised one, where the config does not say what was before."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    wanted = {
        "yarn": rotary.yarn(THETA, 64, FACTOR, WINDOW),
        "llama3": rotary.llama3(rotary.default(THETA, 64), FACTOR, WINDOW),
    }[kind]
    raised = {"max_position_embeddings": int(FACTOR) * WINDOW, "head_dim": 64}
    stock = tiny_model("llama", rope_parameters={**PLAIN, "rope_type": kind, "factor": FACTOR, **bands}, **raised)
    assert not torch.allclose(_frequencies(stock), wanted, rtol=1e-2)
    model = _model(head_dim=64)
    ap.patch_rope_scaling(model, kind=kind, factor=FACTOR)
    _close(_frequencies(model), wanted, rtol=2e-5)


def test_nested_yarn_heeds_truncate():
    """Upstream looks for ``truncate`` beside the layer types, where it never is."""
    wanted = {flag: rotary.yarn(1e6, 16, FACTOR, WINDOW, truncate=flag) for flag in (True, False)}
    assert not torch.allclose(wanted[True], wanted[False], rtol=1e-2)
    nested = copy.deepcopy(tiny_config("gemma3_text", max_position_embeddings=WINDOW).rope_parameters)
    yarn = {"rope_type": "yarn", "factor": FACTOR, "truncate": False, "original_max_position_embeddings": WINDOW}
    nested["full_attention"] |= yarn
    stock = tiny_model("gemma3_text", max_position_embeddings=4 * WINDOW, rope_parameters=nested)
    _close(stock.model.rotary_emb.full_attention_inv_freq, wanted[True])  # the fault
    model = tiny_model("gemma3_text", max_position_embeddings=WINDOW)
    report = ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR, truncate=False)
    _close(model.model.rotary_emb.full_attention_inv_freq, wanted[False])
    assert model.model.rotary_emb.full_attention_attention_scaling == pytest.approx(rotary.yarn_attention(FACTOR))
    assert "transformers drops truncate" in str(report)
    assert torch.equal(_logits(model, 100), _logits(_natively(model), 100))


@pytest.mark.deprecated("rope_scaling")
def test_rope_theta_survives(tmp_path):
    """Upstream crashes on ``from_pretrained(rope_scaling=...)``, which loses the base."""
    _model({**PLAIN, "rope_theta": 500_000.0}).save_pretrained(tmp_path)
    yarn = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW}
    with pytest.raises((KeyError, TypeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, rope_scaling=yarn)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR)
    assert model.config.rope_parameters["rope_theta"] == 500_000.0
    _close(_frequencies(model), rotary.yarn(500_000.0, 16, FACTOR, WINDOW))
