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
