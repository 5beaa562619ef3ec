"""Which transforms are found to leave attention unchanged: a table by family, and that looking leaves no trace."""

import random

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.functional.gauge import fixed, rotary, unrotated
from hf_attnpatch.heads.estimate import find_frames
from hf_attnpatch.probe import quiet

HALVES, PAIRS, NONE = rotary(16, 16, False), rotary(16, 16, True), unrotated(16)

# (type, overrides) -> words of the report, keys' frame, whether heads may change places; one entry for each kind of
# layer where a family has several. Every word is upstream's: `rotate_half` or `rotate_every_two`, `rotary_dim` or
# `partial_rotary_factor`, `q_norm`, ALiBi slopes, sinks.
ROWS = [
    ("llama", {}, ("rotary halves", HALVES, True)),
    ("llama", {"num_key_value_heads": 2}, ("rotary halves", HALVES, True)),
    ("qwen2", {}, ("rotary halves", HALVES, True)),
    ("phi3", {}, ("rotary halves", HALVES, True)),
    ("falcon", {}, ("rotary halves", HALVES, True)),
    ("gpt_oss", {}, ("rotary halves", HALVES, False)),  # a sink for each head
    ("cohere", {}, ("rotary, interleaved", PAIRS, True)),
    ("gptj", {}, ("rotary, interleaved of 8 of 16 dimensions", rotary(16, 8, True), True)),
    ("gptj", {"rotary_dim": 16}, ("rotary, interleaved", PAIRS, True)),
    ("codegen", {}, ("rotary, interleaved of 8 of 16 dimensions", rotary(16, 8, True), True)),
    ("gpt_neox", {}, ("rotary halves of 4 of 16 dimensions", rotary(16, 4, False), True)),
    ("phi", {}, ("rotary halves of 8 of 16 dimensions", rotary(16, 8, False), True)),
    ("stablelm", {}, ("rotary halves of 4 of 16 dimensions", rotary(16, 4, False), True)),
    ("glm4", {}, ("rotary, interleaved of 8 of 16 dimensions", rotary(16, 8, True), True)),
    ("qwen3", {}, ("rotary halves, normed", HALVES, True)),
    ("gemma3_text", {}, ("rotary halves, normed", HALVES, True)),
    ("olmo2", {}, ("rotary halves, normed", HALVES, False)),  # its norm has other weights for each head
    ("exaone4", {}, ("rotary halves, normed", HALVES, True), ("nothing rotates keys, normed", NONE, True)),
    ("glm4_moe", {"use_qk_norm": True}, ("rotary halves of 8 of 16 dimensions, normed", rotary(16, 8, False), True)),
    ("llama4_text", {}, ("rotary, interleaved, normed", PAIRS, True), ("nothing rotates keys", NONE, True)),
    ("cohere2", {}, ("rotary, interleaved", PAIRS, True), ("nothing rotates keys", NONE, True)),
    *((t, {}, ("nothing rotates keys", NONE, True)) for t in ("gpt2", "opt", "bart", "gpt_neo")),
    *((t, {}, ("nothing rotates keys", NONE, False)) for t in ("bloom", "mpt")),  # a slope for each head
    ("falcon", {"alibi": True}, ("nothing rotates keys", NONE, False)),
    ("persimmon", {}, ("no transform of keys is known", fixed(16), True)),  # a LayerNorm behind the projection
    ("fuyu", {}, ("no transform of keys is known", fixed(16), True)),
    ("cohere", {"use_qk_norm": True}, ("no transform of keys is known", fixed(16), False)),
]
ENCODERS = [
    ("bert", {}, ("nothing rotates keys", NONE, True)),
    ("distilbert", {}, ("nothing rotates keys", NONE, True)),
    ("modernbert", {}, ("rotary halves", HALVES, True)),
    ("esmc", {}, ("no transform of keys is known", fixed(16), False)),
]


def _frames(model):
    sites = [s for s in ap.describe(model).sites if not s.cross]
    with quiet(model):
        return list(find_frames(model, sites).values())


def _cells():
    for encoder, rows in ((False, ROWS), (True, ENCODERS)):
        for model_type, overrides, *wanted in rows:
            name = "-".join([model_type, *overrides])
            yield pytest.param(model_type, encoder, overrides, wanted, id=name)


def assert_frame(found, wanted):
    for name in ("planes", "block", "fixed"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist()


@pytest.mark.parametrize(("model_type", "encoder", "overrides", "wanted"), list(_cells()))
def test_what_is_found(model_type, encoder, overrides, wanted):
    found = _frames(tiny_model(model_type, encoder=encoder, **overrides))
    assert list(dict.fromkeys((f.how, f.permutes) for f in found)) == [(how, permutes) for how, _, permutes in wanted]
    for frames in found:
        assert_frame(frames.keys, next(keys for how, keys, _ in wanted if how == frames.how))
        assert_frame(frames.values, NONE)  # nothing acts on values before the output projection, in any of these


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gpt_neox", "cohere", "glm4", "qwen3", "gemma3_text", "bloom", "persimmon"]
)
def test_the_precision_of_the_weights_changes_no_finding(model_type, dtype):
    wanted = [(f.how, f.permutes) for f in _frames(tiny_model(model_type))]
    assert [(f.how, f.permutes) for f in _frames(tiny_model(model_type, dtype=dtype))] == wanted


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "glm4"])
def test_another_seed_changes_no_finding(model_type):
    for seed in (1, 2, 3):
        assert {f.how for f in _frames(tiny_model(model_type, seed))} == {
            f.how for f in _frames(tiny_model(model_type))
        }


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_kernel_changes_no_finding(kernel):
    assert {f.how for f in _frames(tiny_model("llama", attn_implementation=kernel))} == {"rotary halves"}


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "olmo2"])
def test_what_a_norm_multiplies_by_is_read(model_type, offset):
    """Against keys of the model itself: RMS norm of a unit vector times the scale."""
    model = tiny_model(model_type)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_norm.weight += offset
    frames = _frames(model)[0]
    weight = attention.k_norm.weight.detach().double()
    wanted = (1 + weight if model_type == "gemma3_text" else weight).view(-1, 16).expand(4, 16)
    torch.testing.assert_close(frames.key_scale, wanted, rtol=1e-5, atol=1e-6)
    query = attention.q_norm.weight.detach().double()
    query = (1 + query if model_type == "gemma3_text" else query).view(-1, 16).expand(4, 16)
    torch.testing.assert_close(frames.query_scale, query, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "stablelm", "persimmon"])
def test_without_a_norm_that_scales_the_scale_is_one(model_type):
    for frames in _frames(tiny_model(model_type)):
        assert torch.equal(frames.query_scale, torch.ones(4, 16, dtype=torch.float64))
        assert torch.equal(frames.key_scale, torch.ones(4, 16, dtype=torch.float64))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3", "olmo2", "gemma3_text", "gptj", "bert", "bart"])
def test_looking_leaves_no_trace(model_type):
    model = tiny_model(model_type, encoder=model_type == "bert", attn_implementation="eager").train()
    model.get_submodule(ap.describe(model).sites[0].path).eval()  # modes need not be all alike
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("0" in name)
    before, state, numbers = snapshot(model), torch.get_rng_state(), random.getstate()
    _frames(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers


class Injected(Exception):
    """Not one that the package could expect."""


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_a_failure_on_the_way_leaves_no_trace(model_type, at):
    """The output projection raises at one of its calls: while recording, or in one of the trials."""
    model = tiny_model(model_type).train()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == at:
            raise Injected

    handle = model.get_submodule(ap.describe(model).sites[0].output).register_forward_pre_hook(fail)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(Injected):
        _frames(model)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()


def test_a_module_that_does_not_run_is_named():
    model = tiny_model("llama")
    sites = ap.describe(model).sites
    model.model.layers = model.model.layers[:1]
    with quiet(model), pytest.raises((AttnPatchError, AttributeError), match=r"1\.self_attn|no attribute"):
        find_frames(model, sites)
