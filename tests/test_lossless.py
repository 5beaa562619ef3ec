"""Conversions that must lose nothing: heads that do the same in another basis, another order, with other constants."""

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from gauges import (
    FRAMES,
    NORMED,
    even_norms,
    read,
    replicate,
    shift_key_biases,
    shift_value_biases,
    shuffle,
    sites,
    transform,
    write,
)

import hf_attnpatch as ap
from hf_attnpatch.functional.gauge import random_gauge
from hf_attnpatch.probe import default_inputs, largest_difference, trace

EXACT = 1e-5  # of the largest logit, fp32
SHUFFLED = 1e-4
GROUPED = ["llama", "qwen2", "qwen3", "gemma3_text", "stablelm", "phi3", "glm4", "olmo2", "cohere"]
FIXED_ORDER = {"bloom", "mpt", "gpt_oss", "olmo2"}  # slopes, sinks, norm weights of each head


# one of each kind in the fast run: RoPE in halves, interleaved, partial, none; fused, transposed, biased, normed
QUICK = {"llama", "gptj", "gpt_neox", "gpt2", "qwen3", "bert"}


def families(names=FRAMES):
    """The table's families as parameters; those beyond the quick ones are `full`."""
    return [pytest.param(t, marks=() if t in QUICK else pytest.mark.full) for t in sorted(names)]


def tokens(rows=8, length=64):
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model):
    long = {"input_ids": tiny_inputs(model, batch=2, length=48, seed=3)["input_ids"]}
    return torch.cat([trace(model, inputs).logits.flatten(0, -2) for inputs in (default_inputs(model), long)])


def off(before, model):
    return largest_difference(before, logits(model))


def build(model_type, **overrides):
    model = tiny_model(model_type, encoder=model_type == "bert", **overrides)
    if model_type in NORMED:
        even_norms(model)
    return model


def agreeing(model_type, groups, seed=0, spread=0.5, **overrides):
    """A model whose future groups agree up to allowed transforms, and its logits; shown to be no plain copies."""
    model = build(model_type, **overrides)
    replicate(model, groups)
    before = logits(model)
    transform(model, seed, spread)
    return model, before


def convert(model, n, method, grouping="adjacent"):
    text = {"calibration": tokens(), "refine_steps": 6} if method in ("calibrated", "refined") else {}
    return ap.patch_grouped_query(model, num_kv_heads=n, method=method, grouping=grouping, **text)


@pytest.mark.parametrize("model_type", FRAMES)
def test_every_transform_of_the_table_leaves_the_logits(model_type):
    model = build(model_type)
    before, state = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    transform(model)
    assert off(before, model) <= EXACT
    moved = [name for name, p in model.named_parameters() if (p - state[name]).abs().max() > 0.1]
    assert len(moved) >= 2 * 2, "keys, values and what reads them, in two layers"


@pytest.mark.parametrize("model_type", sorted(set(FRAMES) - FIXED_ORDER))
def test_another_order_of_heads_leaves_the_logits(model_type):
    model = build(model_type)
    before = logits(model)
    shuffle(model)
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert", "bloom"])
@pytest.mark.parametrize("shift", [shift_key_biases, shift_value_biases])
def test_constants_leave_the_logits(model_type, shift):
    model = build(model_type)
    before = logits(model)
    shift(model)
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("model_type", families())
@pytest.mark.parametrize("method", ["principal", "calibrated", "refined"])
def test_heads_that_agree_up_to_allowed_transforms_merge_without_loss(model_type, method):
    model, before = agreeing(model_type, 2)
    convert(model, 2, method)
    assert off(before, model) <= EXACT
    assert {s.num_kv_heads for s in ap.describe(model).sites} == {2}


@pytest.mark.parametrize("model_type", families())
def test_so_they_do_into_one(model_type):
    model, before = agreeing(model_type, 1)
    convert(model, 1, "calibrated")
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("model_type", families())
def test_procrustes_loses_nothing_where_heads_are_only_turned(model_type):
    model, before = agreeing(model_type, 2, spread=0.0)
    convert(model, 2, "procrustes")
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("method", ["first", "mean", "mean_rescaled"])
@pytest.mark.parametrize("model_type", ["llama", "gptj", "gpt2", "gpt_neox", "qwen2", "qwen3"])
def test_plain_methods_do_lose(model_type, method):
    """Otherwise the tests above would hold of models whose heads are plain copies."""
    model, before = agreeing(model_type, 2)
    convert(model, 2, method)
    assert off(before, model) > 0.1


@pytest.mark.parametrize("method", ["procrustes", "principal", "calibrated", "refined"])
@pytest.mark.parametrize("model_type", families(GROUPED))
def test_replicated_up_and_converted_back_is_the_original(model_type, method):
    model = tiny_model(model_type, num_key_value_heads=2)
    before = logits(model)
    ap.patch_grouped_query(model, num_kv_heads=4)
    convert(model, 2, method)
    assert off(before, model) <= EXACT
    assert {s.num_kv_heads for s in ap.describe(model).sites} == {2}


@pytest.mark.parametrize("method", ["principal", "calibrated", "refined"])
@pytest.mark.parametrize("model_type", families(GROUPED))
def test_heads_that_are_grouped_already_are_shared_further(model_type, method):
    """Two key-value heads under four query heads become one."""
    model, before = agreeing(model_type, 1, num_key_value_heads=2)
    convert(model, 1, method)
    assert off(before, model) <= EXACT


# the gauge test of the design: replicated, transformed, shuffled, and found again

GAUGE = sorted(set(FRAMES) - FIXED_ORDER)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("model_type", families(GAUGE))
def test_shuffled_heads_find_each_other(model_type, seed):
    model, before = agreeing(model_type, 2, seed)
    shuffle(model, seed)
    assert off(before, model) <= EXACT
    report = convert(model, 2, "calibrated", "similar")
    assert off(before, model) <= SHUFFLED
    for layer in report.damage.layers:
        assert layer.key_energy == pytest.approx(1, abs=1e-4)
        assert layer.value_energy == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("model_type", families(GAUGE))
def test_where_mean_pooling_destroys_the_model(model_type):
    model, before = agreeing(model_type, 2)
    shuffle(model)
    convert(model, 2, "mean")
    assert off(before, model) > 0.1


@pytest.mark.parametrize(("heads", "kv", "n"), [(8, 8, 2), (8, 8, 4), (12, 12, 6), (12, 12, 3), (16, 8, 4)])
def test_many_heads_find_each_other(heads, kv, n):
    """Exact enumeration, matching and the greedy search."""
    model, before = agreeing(
        "llama", n, num_attention_heads=heads, num_key_value_heads=kv, hidden_size=16 * heads, head_dim=16
    )
    shuffle(model, 5)
    convert(model, n, "calibrated", "similar")
    assert off(before, model) <= SHUFFLED


@pytest.mark.parametrize("method", ["principal", "calibrated"])
@pytest.mark.parametrize(("keys", "values"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_keys_and_values_both_say_who_belongs_together(model_type, keys, values, method):
    """All keys are one and values are two, or the reverse."""
    model = build(model_type)
    replicate(model, keys, values)
    before = logits(model)
    transform(model, 3)
    shuffle(model, 3)
    convert(model, 2, method, "similar")
    assert off(before, model) <= SHUFFLED


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_inputs_that_are_never_there_count_for_nothing(model_type):
    """Heads agree on what their inputs can be; on channels that a norm switches off they are anything, and large.

    Without text the size of each input comes from random tokens.
    """
    model, _ = agreeing(model_type, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "input_layernorm" in name or "ln_1" in name:
                parameter[:32] = 0
    before = logits(model)
    for site in sites(model):
        heads = read(model, site)
        for rows in (heads.query, heads.key, heads.value):
            rows[..., :32] = torch.randn(rows[..., :32].shape, generator=generator, dtype=torch.float64)
        write(model, site, heads)
    assert off(before, model) <= EXACT
    convert(model, 2, "principal")
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("method", ["principal", "refined"])
@pytest.mark.parametrize("model_type", ["llama", "gptj", "gpt2", "gpt_neox"])
def test_other_methods_find_them_too(model_type, method):
    model, before = agreeing(model_type, 2)
    shuffle(model)
    convert(model, 2, method, "similar")
    assert off(before, model) <= SHUFFLED


@pytest.mark.parametrize("method", ["calibrated", "refined"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert"])
@pytest.mark.parametrize("shift", [shift_key_biases, shift_value_biases])
def test_constants_that_nothing_sees_cost_nothing(model_type, shift, method):
    """A key's bias where nothing rotates is a softmax no-op; a value's bias folds into the output's."""
    model, before = agreeing(model_type, 2)
    shift(model)
    assert off(before, model) <= EXACT
    convert(model, 2, method)
    assert off(before, model) <= EXACT


@pytest.mark.parametrize("method", ["procrustes", "principal"])
def test_heads_behind_uneven_norms_are_turned_as_the_norms_leave_them(method):
    """Qwen3's heads, turned after the norms' weights: no turn is exact before them, the right one is nearly so."""

    def divergence(by):
        model, generator = tiny_model("qwen3"), torch.Generator().manual_seed(0)
        replicate(model, 2)
        for site in sites(model):
            attention, heads = model.get_submodule(site.path), read(model, site)
            norms = attention.q_norm.weight, attention.k_norm.weight
            with torch.no_grad():
                for weight in norms:
                    weight.copy_((0.2 * torch.randn(16, generator=generator)).exp())
            of_query, of_key = (weight.detach().double()[:, None] for weight in norms)
            for head in range(4):
                key, query = random_gauge(FRAMES["qwen3"], generator, spread=0.0)
                heads.key[head] = key @ (of_key * heads.key[head]) / of_key
                heads.query[head] = query @ (of_query * heads.query[head]) / of_query
            write(model, site, heads)
        damage = ap.patch_grouped_query(model, num_kv_heads=2, method=by, calibration=tokens()).damage
        return sum(layer.gaps["merged"].attention for layer in damage.layers)

    assert divergence(method) < 0.03 * divergence("mean")


@pytest.mark.parametrize("model_type", ["bloom", "gpt_oss"])
def test_heads_that_must_keep_their_places_are_not_moved(model_type):
    """The groups that agree are no neighbours, and slopes or sinks belong to a place: an error that says so."""
    model = build(model_type)
    replicate(model, 2)
    shuffle(model, 1)
    before = logits(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=r"cannot be reordered; use grouping='adjacent'"):
        convert(model, 2, "calibrated", "similar")
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("method", ["principal", "calibrated"])
@pytest.mark.parametrize(
    ("model_type", "moves"), [("llama", True), ("gpt2", True), ("bloom", False), ("gpt_oss", False)]
)
def test_by_default_similar_heads_share_where_they_may_be_moved(model_type, moves, method):
    """Slopes and sinks keep heads in their places: neighbours share, and the record says what was done."""
    model = build(model_type)
    replicate(model, 2)
    shuffle(model, 1)
    before = logits(model)
    report = convert(model, 2, method, None)
    groups = [layer.groups for layer in report.damage.layers]
    assert (off(before, model) <= SHUFFLED) == moves
    assert (groups != [((0, 1), (2, 3))] * len(groups)) == moves
    assert report.record["patches"][0]["grouping"] == ("similar" if moves else "adjacent")
