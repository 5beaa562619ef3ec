"""A patched model is an ordinary model: copied, pickled, beside others, decoding, with the cache that was promised."""

import copy
import inspect
import pickle

import matrix
import pytest
import torch
from caches import CACHE
from matrix import applicable
from outcomes import UPSTREAM
from patches import CASES, build
from snapshot import bits, snapshot

import hf_attnpatch as ap
from hf_attnpatch.probe import codebooks, default_inputs, trace

_GROUPED = {case.name: case for case in CASES if case.kind == "grouped_query"}


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable(only=lambda case: case.everywhere))
def test_copies_and_pickles_are_the_same_model(model_type, encoder, case):
    model = build(model_type, encoder, case)
    ap.apply(model, case.patch)
    inputs = default_inputs(model)
    logits = trace(model, inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(trace(twin, inputs).logits, logits)
        assert type(twin.config) is type(model.config)
        assert twin.config.to_dict() == model.config.to_dict()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert torch.equal(trace(model, inputs).logits, logits)  # shares nothing with its copies


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable(only=lambda case: case.everywhere))
def test_two_models_in_one_process_do_not_meet(model_type, encoder, case):
    bystander, model = build(model_type, encoder, case, seed=1), build(model_type, encoder, case)
    inputs = default_inputs(model)
    before, logits = snapshot(bystander), trace(bystander, inputs).logits
    ap.apply(model, case.patch)
    trace(model, inputs)
    assert torch.equal(trace(bystander, inputs).logits, logits)
    assert snapshot(bystander) == before


def _cache_elements(model):
    """Heads and elements of every layer that holds keys, or None where the model has no such cache."""
    inputs = {name: value for name, value in default_inputs(model).items() if name != "attention_mask"}
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return None
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).get(CACHE)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    held = [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
    return [(layer.keys.shape[1], layer.keys.numel() + layer.values.numel()) for layer in held] or None


@pytest.mark.parametrize(
    ("model_type", "encoder", "case"),
    applicable("grouped_query", only=lambda case: case.name in ("grouped_2_mean", "grouped_1_first")),
)
def test_the_cache_shrinks_by_exactly_the_group_size(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = _cache_elements(model)
    if before is None:
        assert (model_type, encoder) not in matrix.MUST_CACHE
        pytest.skip("its forward returns no cache of keys and values")
    heads_before = {site.num_kv_heads for site in ap.describe(model).sites if not site.cross and not site.tower}
    ap.apply(model, case.patch)
    after = _cache_elements(model)
    assert len(before) == len(after) > 0
    assert {heads for heads, _ in before} == heads_before
    assert {heads for heads, _ in after} == {case.patch.num_kv_heads}
    for (heads, elements), (fewer, less) in zip(before, after, strict=True):
        assert elements * fewer == less * heads


def _generations(model):
    """Greedy tokens with a cache, and without."""
    inputs = {name: value for name, value in default_inputs(model).items() if not name.startswith("decoder")}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    kwargs = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": None}
    if codebooks(model) > 1:  # audio decoders pad with what they begin with
        kwargs |= {"decoder_start_token_id": 0, "num_return_sequences": 1}
    return [model.generate(**inputs, use_cache=use_cache, **kwargs) for use_cache in (True, False, True)]


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable(only=lambda case: case.everywhere))
def test_greedy_generation_with_a_cache_is_that_without(model_type, encoder, case):
    model = build(model_type, encoder, case)
    if not model.can_generate():
        pytest.skip("an encoder does not generate")
    before = _generations(model)
    if not torch.equal(*before[:2]):
        assert UPSTREAM[model_type + "-masked" * encoder], "transformers' own model does not either, and nobody knew"
        pytest.skip("transformers' own model does not either")
    report = ap.apply(model, case.patch)
    cached, full, again = _generations(model)
    if case.kind == "rope_scaling" and report.stock and not torch.equal(cached, full):
        pytest.skip("transformers drops the cache of such a model where the text outgrows the original window")
    assert cached.shape == before[0].shape
    assert torch.equal(cached, full)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "falcon"])
def test_beam_search_reorders_a_narrow_cache(model_type):
    model = build(model_type, False, _GROUPED["grouped_2_mean"])
    ap.patch_grouped_query(model, num_kv_heads=2)
    ids = torch.tensor([[11, 23, 35, 47], [90, 13, 8, 44]])
    kwargs = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **kwargs)
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **kwargs))


def test_a_patched_model_trains():
    model = build("gpt2", False, _GROUPED["grouped_2_mean"])
    ap.patch_grouped_query(model, num_kv_heads=2)
    before = {name: bits(p) for name, p in model.named_parameters()}
    ids = torch.arange(5, 29).view(2, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(bits(p) != before[name] for name, p in model.named_parameters())
