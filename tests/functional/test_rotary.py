"""Rotary frequencies against transformers' own functions, and what the papers say of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FREQUENCIES
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_attnpatch.functional import rotary

thetas = st.sampled_from([100.0, 10_000.0, 500_000.0, 1e6])
dims = st.sampled_from([8, 32, 64, 128])
windows = st.sampled_from([64, 512, 4096, 8192])
factors = st.floats(1.01, 64.0)


def upstream(theta, dim, window, factor, kind, **more):
    """Frequencies and the factor on cos and sin, from transformers."""
    scaling = {"rope_type": kind, "rope_theta": theta, **({} if kind == "default" else {"factor": factor}), **more}
    if kind in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = window
    config = LlamaConfig(
        hidden_size=4 * dim,
        num_attention_heads=4,
        head_dim=dim,
        max_position_embeddings=round(window * factor),
        rope_parameters=scaling,
    )
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=FREQUENCIES, atol=0)


@settings(max_examples=40)
@given(theta=thetas, dim=dims)
def test_default(theta, dim):
    close(rotary.default(theta, dim), upstream(theta, dim, 512, 1.0, "default")[0])


@settings(max_examples=40)
@given(theta=thetas, dim=dims, factor=factors)
def test_linear(theta, dim, factor):
    close(rotary.linear(rotary.default(theta, dim), factor), upstream(theta, dim, 512, factor, "linear")[0])


@settings(max_examples=60)
@given(theta=thetas, dim=dims, window=windows, factor=factors, low=st.sampled_from([1.0, 2.0]), high=st.floats(3, 16))
def test_llama3(theta, dim, window, factor, low, high):
    wanted, attention = upstream(theta, dim, window, factor, "llama3", low_freq_factor=low, high_freq_factor=high)
    found = rotary.llama3(rotary.default(theta, dim), factor, window, low, high)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=0)  # the band's edges are rounded differently
    assert attention == 1.0


def yarn_ramp(theta, dim, window, factor, fast, slow):
    """YaRN as its code has it, in loops: a ramp over the *index* between two correction dimensions, not truncated."""

    def correction(turns):
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(correction(fast), 0), min(correction(slow), dim - 1)
    out = []
    for i in range(dim // 2):
        frequency = theta ** (-2 * i / dim)
        ramp = min(max((i - low) / ((high if high != low else high + 0.001) - low), 0.0), 1.0)
        out.append(frequency / factor * ramp + frequency * (1 - ramp))
    return torch.tensor(out)


@settings(max_examples=60)
@given(theta=thetas, dim=dims, window=windows, factor=factors)
def test_the_loop_above_is_what_transformers_computes(theta, dim, window, factor):
    wanted, attention = upstream(theta, dim, window, factor, "yarn", truncate=False, beta_fast=32.0, beta_slow=1.0)
    torch.testing.assert_close(yarn_ramp(theta, dim, window, factor, 32.0, 1.0), wanted, rtol=1e-4, atol=0)
    assert attention == pytest.approx(rotary.yarn_attention(factor))


@settings(max_examples=60)
@given(theta=thetas, dim=dims, window=windows, factor=factors)
def test_by_parts_agrees_with_yarn_outside_of_the_ramp(theta, dim, window, factor):
    """The paper ramps over turns, its code over the index: both keep and divide the same frequencies."""
    wanted = upstream(theta, dim, window, factor, "yarn", truncate=False, beta_fast=32.0, beta_slow=1.0)[0]
    plain = rotary.default(theta, dim)
    found = rotary.by_parts(plain, factor, window, 32.0, 1.0)
    turns = window * plain / (2 * math.pi)
    fast, slow = turns >= 32 * 1.0001, turns <= 1 / 1.0001
    close(found[fast], wanted[fast])
    close(found[slow], wanted[slow])
    close(found[fast], plain[fast])
    close(found[slow], plain[slow] / factor)
    between = ~fast & ~slow
    assert ((found <= plain * 1.0001) & (found >= plain / factor * 0.9999))[between].all()


@settings(max_examples=40)
@given(theta=thetas, dim=dims, window=windows, factor=st.floats(1.0, 64.0))
def test_no_scaling_raises_a_frequency_or_divides_it_by_more_than_the_factor(theta, dim, window, factor):
    plain = rotary.default(theta, dim)
    for scaled in (
        rotary.linear(plain, factor),
        rotary.by_parts(plain, factor, window),
        rotary.llama3(plain, factor, window),
    ):
        assert (scaled <= plain * (1 + FREQUENCIES)).all()
        assert (scaled >= plain / factor * (1 - FREQUENCIES)).all()


def test_factor_one_is_the_identity():
    plain = rotary.default(10_000.0, 64)
    assert torch.equal(rotary.linear(plain, 1.0), plain)
    close(rotary.by_parts(plain, 1.0, 512), plain)
    close(rotary.llama3(plain, 1.0, 512), plain)
    assert rotary.yarn_attention(1.0) == rotary.longrope_attention(1.0, 512) == 1.0


@settings(max_examples=30)
@given(window=windows, factor=factors)
def test_longrope_attention(window, factor):
    half = [1.0] * 4
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=round(window * factor),
        rope_parameters={
            **{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": half, "long_factor": half},
            **{"factor": factor, "original_max_position_embeddings": window},
        },
    )
    wanted = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1]
    assert rotary.longrope_attention(factor, window) == pytest.approx(wanted)


PLAIN = rotary.default(10000.0, 32)


def ramp(turns, slow, fast):
    return min(1.0, max(0.0, (turns - slow) / (fast - slow)))


@pytest.mark.parametrize(("slow", "fast"), [(None, None), (2.0, 7.5)])
def test_by_parts_is_a_ramp_over_turns_within_the_window(slow, fast):
    """2309.00071, section 3.2: gamma over r = L / wavelength, from alpha = 1 to beta = 32."""
    given = {} if slow is None else {"beta_slow": slow, "beta_fast": fast}
    found = rotary.by_parts(PLAIN, 4.0, 512, **given)
    for one, old in zip(found.tolist(), PLAIN.double().tolist(), strict=True):
        keep = ramp(512 * old / (2 * math.pi), slow or 1.0, fast or 32.0)
        assert one == pytest.approx(old * (keep + (1 - keep) / 4.0), rel=FREQUENCIES)


def test_llama3_s_own_limits():
    """Llama 3.1 as published: 1 and 4 turns within the window."""
    for one, old in zip(rotary.llama3(PLAIN, 8.0, 512).tolist(), PLAIN.double().tolist(), strict=True):
        keep = ramp(512 * old / (2 * math.pi), 1.0, 4.0)
        assert one == pytest.approx(old * (keep + (1 - keep) / 8.0), rel=FREQUENCIES)


def test_ntk_keeps_the_highest_and_divides_the_lowest():
    found = rotary.ntk(PLAIN, 8.0)
    for i, one in enumerate(found.tolist()):
        assert one == pytest.approx((10000.0 * 8.0 ** (32 / 30)) ** (-2 * i / 32), rel=1e-5)
    assert rotary.ntk_theta(10000.0, 8.0, 32) == pytest.approx(10000.0 * 8.0 ** (32 / 30))
    assert found[0] == PLAIN[0]
    assert float(found[-1]) == pytest.approx(float(PLAIN[-1]) / 8, rel=1e-6)


def test_resonance_rounds_wavelengths_within_the_window():
    found = rotary.resonance(PLAIN, 100)
    changed = 0
    for one, old in zip(found.tolist(), PLAIN.double().tolist(), strict=True):
        wavelength = 2 * math.pi / old
        wanted = 2 * math.pi / (round(wavelength) if wavelength < 100 else wavelength)
        assert one == pytest.approx(wanted, rel=FREQUENCIES)
        changed += wanted != old
    assert 0 < changed < len(PLAIN)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_clipped_frequencies_end_in_half_a_cosine(count):
    found = rotary.clipped(PLAIN, count)
    assert torch.equal(found[: 16 - count], PLAIN[: 16 - count])
    for i in range(count):
        taper = (1 + math.cos(math.pi * i / (count - 1))) / 2
        assert float(found[16 - count + i]) == pytest.approx(float(PLAIN[16 - count + i]) * taper, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("truncate", [None, True, False])
@pytest.mark.parametrize(("theta", "dim", "window"), [(10000.0, 32, 512), (10.0, 8, 477), (10.0, 8, 64), (1e6, 8, 7)])
def test_yarn_s_own_limits_are_transformers(truncate, theta, dim, window):
    """Also where the ramp would begin before the first frequency, or end behind the last."""
    given = {} if truncate is None else {"truncate": truncate}
    wanted, _ = upstream(theta, dim, window, 4.0, "yarn", **given)
    close(rotary.yarn(theta, dim, 4.0, window, **given), wanted)


@pytest.mark.parametrize("factor", [0.25, 0.999, 1.0])
def test_a_factor_that_shortens_leaves_cos_and_sin_alone(factor):
    assert rotary.yarn_attention(factor) == rotary.longrope_attention(factor, 512) == 1.0


def test_mscale_multiplies_the_logarithm():
    """DeepSeek's: 0.1 mscale ln s + 1."""
    assert rotary.yarn_attention(40.0, 0.707) == pytest.approx(0.1 * 0.707 * math.log(40) + 1)
    assert rotary.yarn_attention(40.0) == pytest.approx(0.1 * math.log(40) + 1)


def test_frequencies_are_single_precision_wherever_a_model_is_built():
    wanted = rotary.yarn(10000.0, 32, 4.0, 512)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = rotary.default(10000.0, 32), rotary.yarn(10000.0, 32, 4.0, 512)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], PLAIN)
    assert torch.equal(found[1], wanted)
