"""What stays inside a patched model, and the probe that runs it."""

import copy
import pickle

import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache

import hf_attnpatch as ap
from hf_attnpatch.edits import SetAttention, SetConfig
from hf_attnpatch.modules.heads import GroupedProjection, NarrowCache
from hf_attnpatch.probe import default_inputs, disagreement, largest_difference, trace, trial


def _projection(bias=True):
    weight, more = torch.randn(2 * 3, 5), torch.randn(2 * 3) if bias else None
    parameters = nn.Parameter(weight), nn.Parameter(more) if bias else None
    return GroupedProjection(*parameters, torch.tensor([0, 0, 1, 1]), 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 7, 5)])
def test_a_shared_projection_is_a_projection_with_repeated_rows(bias, shape):
    module = _projection(bias)
    rows = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])
    wide = nn.Linear(5, 12, bias=bias)
    wide.weight.data = module.weight.data[rows]
    if bias:
        wide.bias.data = module.bias.data[rows]
    x = torch.randn(shape)
    torch.testing.assert_close(module(x), wide(x))


def test_a_shared_projection_keeps_no_helper_in_the_checkpoint():
    assert set(_projection().state_dict()) == {"weight", "bias"}
    assert set(_projection(bias=False).state_dict()) == {"weight"}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "bert"])
def test_a_patched_model_has_the_keys_that_it_had(model_type):
    model = tiny_model(model_type, encoder=model_type == "bert")
    before = list(model.state_dict())
    ap.patch_grouped_query(model, num_kv_heads=2)
    assert list(model.state_dict()) == before


def test_gradients_of_shared_rows_add_up():
    module = _projection()
    x = torch.randn(7, 5, dtype=torch.float32)
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, 2 * x.sum(0).expand(6, 5))


def _pair_of_steps(cache):
    """What an attention module does: hand over its keys, get all of them back, twice."""
    keys, values = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)  # (batch, shared, length, dim)
    wide = [t.repeat_interleave(2, dim=1) for t in (keys, values)]
    found = []
    for part in (slice(0, 3), slice(3, 4)):
        found = cache.update(*(t[:, :, part] for t in wide), 0)
    return found, wide


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_narrow_cache_returns_what_was_put_in_and_stores_half(contiguous):
    cache = DynamicCache()
    _, kwargs = NarrowCache(2, contiguous)(None, (), {"past_key_values": cache, "other": 3})
    view = kwargs["past_key_values"]
    assert kwargs["other"] == 3
    assert isinstance(view, Cache)
    (keys, values), wide = _pair_of_steps(view)
    assert torch.equal(keys, wide[0])
    assert torch.equal(values, wide[1])
    assert keys.is_contiguous() or not contiguous
    assert cache.layers[0].keys.shape == (2, 2, 4, 3)
    assert view.get_seq_length() == cache.get_seq_length() == 4


@pytest.mark.parametrize("contiguous", [True, False])
def test_only_self_attention_is_narrow_in_a_pair_of_caches(contiguous):
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    args, _ = NarrowCache(2, contiguous)(None, (pair,), {})
    assert isinstance(args[0], EncoderDecoderCache)
    (keys, _), wide = _pair_of_steps(args[0].self_attention_cache)
    assert torch.equal(keys, wide[0])
    assert pair.self_attention_cache.layers[0].keys.shape[1] == 2
    assert args[0].cross_attention_cache is pair.cross_attention_cache
    assert args[0].is_updated is pair.is_updated


def test_what_stays_in_a_model_copies_and_pickles():
    for thing in (NarrowCache(2, True), _projection()):
        for twin in (copy.deepcopy(thing), pickle.loads(pickle.dumps(thing))):
            assert type(twin) is type(thing)
    module = _projection()
    x = torch.randn(2, 5)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


# -- the probe --------------------------------------------------------------------------------------------------------


def test_a_trace_leaves_no_trace():
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.norm.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    first = trace(model, default_inputs(model), ("model.layers.0", "model.norm"))
    assert first.calls == {"model.layers.0": 1, "model.norm": 1}
    assert torch.equal(trace(model, default_inputs(model)).logits, first.logits)  # dropout is off
    assert not first.logits.requires_grad
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_default_inputs_are_padded_and_padding_is_left_out():
    model = tiny_model("llama")
    inputs = default_inputs(model)
    assert inputs["attention_mask"].sum() == 17
    assert trace(model, inputs).logits.shape == (17, 128)


def test_a_trial_is_undone_whatever_comes_of_it():
    model = tiny_model("llama")
    inputs = default_inputs(model)
    reference, before = trace(model, inputs).logits, snapshot(model)
    assert trial(model, [SetAttention("", "eager")], inputs, reference, backward=True) is None
    assert "logits differ by" in trial(model, [SetAttention("", "eager")], inputs, reference + 1, backward=False)
    assert "no_such" in trial(model, [SetAttention("", "no_such")], inputs, reference, backward=False)
    assert snapshot(model) == before


def test_a_trial_that_runs_into_an_unknown_error_is_undone():
    model = tiny_model("llama")
    inputs = default_inputs(model)
    reference = trace(model, inputs).logits

    def broken(*args):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(broken)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        trial(model, [SetConfig("", "note", 1)], inputs, reference, backward=False)
    assert snapshot(model) == before
    handle.remove()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x, None),
        (lambda x: x + 1e-7, None),
        (lambda x: x + 0.1, "logits differ by"),
        (lambda x: x[:1], "shape"),
        (lambda x: x * float("nan"), "not finite"),
    ],
)
def test_disagreement_is_a_sentence(change, words):
    reference = torch.randn(3, 5)
    found = disagreement(reference, change(reference))
    assert found is None if words is None else words in found


def test_differences_are_relative_to_the_largest_logit():
    assert largest_difference(torch.tensor([100.0, 0.0]), torch.tensor([101.0, 0.0])) == pytest.approx(0.01)
    assert largest_difference(torch.zeros(2), torch.zeros(2)) == 0
