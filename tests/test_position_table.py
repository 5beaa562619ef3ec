"""Longer tables that stock transformers loads, and new ones that are trained."""

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from snapshot import snapshot
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_attnpatch as ap
from hf_attnpatch.functional.tables import METHODS, lengthened

STOCK = [("gpt2", False, 0), ("opt", False, 2), ("biogpt", False, 2), ("gpt_neo", False, 0), ("bert", True, 0)]
STOCK += [("roberta", True, 2), ("distilbert", True, 0), ("esm", True, 2), ("gpt_bigcode", False, 0)]


def _build(model_type, encoder):
    fields = {"pad_token_id": 1} if model_type in ("roberta", "esm") else {}
    return tiny_model(model_type, encoder=encoder, **fields)


def _logits(model, ids, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def _table(model):
    (path,) = ap.describe(model).tables
    return model.get_submodule(path).weight


@pytest.mark.parametrize(("model_type", "encoder", "offset"), STOCK)
def test_stock_transformers_loads_the_same_bits(model_type, encoder, offset, tmp_path):
    model = _build(model_type, encoder)
    old, declared = _table(model).detach().clone(), model.config.max_position_embeddings
    ids = tiny_inputs(model)["input_ids"]
    before, state = _logits(model, ids), snapshot(model)
    report = ap.patch_position_table(model, length=300, method="tile")
    assert report.stock
    assert torch.equal(_logits(model, ids), before)  # within the old length nothing changes
    found = _table(model)
    assert torch.equal(found[:offset], old[:offset])
    assert torch.equal(found[offset:], lengthened(old[offset:], 300, "tile"))
    assert model.config.max_position_embeddings == declared + 300 - (len(old) - offset)

    long = torch.randint(5, 99, (2, 290))
    wanted = _logits(model, long)
    model.save_pretrained(tmp_path)
    again = (AutoModelForMaskedLM if encoder else AutoModelForCausalLM).from_pretrained(tmp_path).eval()
    assert type(again).__module__.startswith("transformers.")
    assert torch.equal(_logits(again, long), wanted)
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name

    report.revert()
    assert {k: v for k, v in snapshot(model).items() if k not in ("registries", "config")} == {
        k: v for k, v in state.items() if k not in ("registries", "config")
    }
    assert torch.equal(_logits(model, ids), before)


@pytest.mark.parametrize(("model_type", "encoder", "offset"), STOCK)
def test_the_rows_before_position_zero_are_those_that_no_token_reads(model_type, encoder, offset):
    model = _build(model_type, encoder)
    _logits_with_grad = model(input_ids=tiny_inputs(model, length=9)["input_ids"]).logits
    _logits_with_grad.square().sum().backward()
    used = _table(model).grad.abs().sum(-1).nonzero().flatten().tolist()
    assert used == list(range(offset, offset + 9))


@pytest.mark.parametrize("method", METHODS)
def test_methods_make_the_rows(method):
    model = _build("roberta", True)
    old = _table(model).detach().clone()
    report = ap.patch_position_table(model, length=200, method=method)
    assert torch.equal(_table(model)[2:], lengthened(old[2:], 200, method))
    assert report.plan.steps[0].proposal.preserves is (method != "interpolate")


def test_a_frozen_table_stays_frozen_and_bf16_stays_bf16():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    model.transformer.wpe.weight.requires_grad_(False)
    ids = tiny_inputs(model)["input_ids"]
    before = _logits(model, ids)
    ap.patch_position_table(model, length=200)
    assert torch.equal(_logits(model, ids), before)
    assert model.transformer.wpe.weight.dtype == torch.bfloat16
    assert not model.transformer.wpe.weight.requires_grad


def test_the_same_length_is_nothing_to_do():
    model = _build("opt", False)
    before = snapshot(model)
    assert not ap.patch_position_table(model, length=128).changed
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("gpt2", {"length": 100}, "below the 128 positions that transformer.wpe has"),
        ("opt", {"length": 127}, "below the 128 positions"),
        ("gpt2", {"length": 128**2 + 1}, "beyond 16384, the square"),
        ("gpt2", {"length": 200, "init": "zeros"}, "init is for a new table"),
        ("llama", {"length": 200, "method": "tile"}, "has no learned position table to tile"),
        ("bloom", {"length": 200, "method": "interpolate"}, "positions here are: alibi"),
        ("gpt2", {"length": 0}, "at least 1"),
        ("gpt2", {"length": 12.5}, "number of tokens"),
        ("gpt2", {"length": 200, "method": "repeat"}, "choose from: tile, interpolate, hierarchical"),
        ("llama", {"length": 200, "init": "ones"}, "choose from: zeros, sinusoidal"),
    ],
)
def test_bad_arguments_are_refused(model_type, fields, words):
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.patch_position_table(model, **fields)
    assert snapshot(model) == before


def test_a_new_table_is_trained_saved_and_made_longer(tmp_path):
    model = tiny_model("llama")
    ids = tiny_inputs(model)["input_ids"]
    bare = tiny_model("llama")
    ap.patch_no_position(bare)
    ap.patch_position_table(model, length=30)
    assert torch.equal(_logits(model, ids), _logits(bare, ids))  # begins as a model without positions
    table = model.get_parameter("model.added_positions.weight")
    optimizer = torch.optim.SGD([table], lr=1.0)
    model(input_ids=ids).logits.square().mean().backward()
    optimizer.step()
    trained = _logits(model, ids)
    assert not torch.equal(trained, _logits(bare, ids))

    model.save_pretrained(tmp_path / "one")
    again = ap.load(tmp_path / "one")
    assert torch.equal(_logits(again, ids), trained)
    with pytest.raises(ap.AttnPatchError, match="the position table, which has 30 rows"):
        _logits(again, torch.randint(5, 99, (1, 31)))
    ap.patch_position_table(again, length=60, method="tile")
    assert torch.equal(_logits(again, ids), trained)
    again.save_pretrained(tmp_path / "two")
    twice = ap.load(tmp_path / "two")
    assert torch.equal(twice.get_parameter("model.added_positions.weight")[30:], table.detach())
    long = torch.randint(5, 99, (1, 60))
    assert torch.equal(_logits(twice, long), _logits(again, long))


def test_a_new_table_takes_a_resized_vocabulary():
    model = tiny_model("llama")
    ap.patch_position_table(model, length=30, init="sinusoidal")
    ids = tiny_inputs(model)["input_ids"]
    before = _logits(model, ids)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert torch.equal(_logits(model, ids)[..., : before.shape[-1]], before)
