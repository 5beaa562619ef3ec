"""Rotary positions on models that had others, another base on models that had them; sinusoid and none beside."""

import copy

import peft
import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from position_reference import logits as reference
from snapshot import snapshot
from tolerances import ROUNDING
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_attnpatch as ap
from hf_attnpatch.attention.registry import set_kernel
from hf_attnpatch.attention.rotation import Rotation, rotation_of
from hf_attnpatch.invariants.training import _checkpoint
from hf_attnpatch.probe import largest_difference

FP32 = ROUNDING[torch.float32]


def _logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def _apart(ids, step=3):
    """Positions with gaps; with a mask, since without one transformers takes gaps for documents."""
    places = step * torch.arange(ids.shape[1])[None].expand_as(ids)
    return {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}


# -- positions with gaps, masks, caches -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert", "roberta", "gpt_bigcode", "xglm", "gptj", "falcon"])
def test_positions_with_gaps_are_followed(model_type):
    model = tiny_model(model_type, encoder=model_type in ("bert", "roberta"))
    ids = tiny_inputs(model)["input_ids"]
    inputs = _apart(ids)
    wanted = reference(model, ids, "rotary", places=inputs["position_ids"][:1], theta=500.0)
    ap.patch_rotary(model, theta=500.0)
    assert largest_difference(wanted, _logits(model, **inputs)) < FP32
    assert largest_difference(wanted, _logits(model, input_ids=ids)) > 1e-3


@pytest.mark.parametrize("patch", [ap.Sinusoidal(), ap.PositionTable(length=80, init="sinusoidal")])
@pytest.mark.parametrize("model_type", ["llama", "gptj"])
def test_added_positions_with_gaps_are_followed(model_type, patch):
    model = tiny_model(model_type)
    ids = tiny_inputs(model)["input_ids"]
    inputs = _apart(ids)
    wanted = reference(model, ids, "sinusoidal", places=inputs["position_ids"][:1])
    ap.apply(model, patch)
    assert largest_difference(wanted, _logits(model, **inputs)) < FP32
    assert largest_difference(wanted, _logits(model, input_ids=ids)) > 1e-3


def test_positions_that_would_be_ignored_are_refused(tmp_path):
    model = tiny_model("gpt_neo")
    report = ap.patch_rotary(model)
    assert "positions are counted" in " ".join(str(report).split())
    ids = tiny_inputs(model)["input_ids"]
    counted = _logits(model, input_ids=ids)
    model.save_pretrained(tmp_path)
    for each in (model, ap.load(tmp_path)):
        with pytest.raises(ap.AttnPatchError, match="only count the tokens from 0"):
            _logits(each, **_apart(ids))
        assert largest_difference(counted, _logits(each, **_apart(ids, step=1))) < FP32


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bloom", "gpt_neo", "gptj", "gpt_bigcode"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_of_padded_rows_is_that_of_each_alone(model_type, cache):
    if cache == "static" and model_type in ("gpt_neo", "gpt_bigcode"):
        pytest.skip("transformers' own model has no static cache")
    model = tiny_model(model_type)
    ap.patch_rotary(model, theta=500.0)
    ids = tiny_inputs(model, length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kind = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 40)
    found = model.generate(ids, attention_mask=mask, **{CACHE: kind}, **options)[:, 12:]
    alone = [model.generate(row[None], use_cache=False, **options)[:, len(row) :] for row in (ids[0], ids[1, 5:])]
    assert torch.equal(found, torch.cat(alone))


def test_kernels_agree_and_rotate_whichever_is_chosen():
    model = tiny_model("gpt2")
    ids = tiny_inputs(model)["input_ids"]
    ap.patch_rotary(model)
    wanted = _logits(model, input_ids=ids)
    for kernel in ("eager", "sdpa"):
        set_kernel(kernel).run(model)
        assert largest_difference(wanted, _logits(model, input_ids=ids)) < FP32
    ap.patch_flash(model, backend="sdpa")
    assert largest_difference(wanted, _logits(model, input_ids=ids)) < FP32
    model.set_attn_implementation("eager")
    assert largest_difference(wanted, _logits(model, input_ids=ids)) < FP32


def test_far_positions_keep_the_relative_property_in_bf16():
    model = tiny_model("gpt2", dtype=torch.bfloat16)
    ap.patch_rotary(model)
    ids = tiny_inputs(model)["input_ids"]
    inputs = _apart(ids, step=1)
    near = _logits(model, **inputs)
    far = _logits(model, **{**inputs, "position_ids": inputs["position_ids"] + 30_000})
    assert largest_difference(near, far) < ROUNDING[torch.bfloat16]


def test_operations_are_followed_without_data_and_leave_no_trace():
    model = tiny_model("gpt2")
    ap.patch_rotary(model)
    ids = tiny_inputs(model)["input_ids"]
    for _ in range(2):  # before a forward has made the frequencies, and after
        assert str(ap.diagnose(model, context=64, hardware="h100"))
        assert _logits(model, input_ids=ids).isfinite().all()


def test_an_adapter_is_rotated_too():
    """Merged and unmerged agree: what LoRA adds to queries and keys is rotated with them."""
    model = tiny_model("gpt2")
    ap.patch_rotary(model)
    ids = tiny_inputs(model)["input_ids"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    apart = _logits(adapted.eval(), input_ids=ids)
    assert largest_difference(apart, _logits(adapted.merge_and_unload(), input_ids=ids)) < FP32


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "bert"])
def test_gradient_checkpointing_recomputes_the_same(model_type):
    model = tiny_model(model_type, encoder=model_type == "bert").train()
    ap.patch_rotary(model)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            _checkpoint(model, on=True)
        model.zero_grad()
        two = [tiny_inputs(model, length=n)["input_ids"] for n in (24, 17)]  # both forwards before a backward
        sum(model(input_ids=ids).logits.square().mean() for ids in two).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", ["grouped", "rotary"])
def test_shared_heads_and_rotation_go_together(first):
    """In either order; keys are rotated once, and the narrow cache stays narrow."""
    model = tiny_model("gpt2")
    grouped, turned = ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Rotary(theta=500.0)
    for patch in (grouped, turned) if first == "grouped" else (turned, grouped):
        ap.apply(model, patch)
    ids = tiny_inputs(model)["input_ids"]
    whole, pieces, cache = _logits(model, input_ids=ids), [], None
    for part in ids.split(8, dim=1):
        with torch.no_grad():
            out = model(input_ids=part, **{CACHE: cache}, use_cache=True)
        cache, pieces = out[CACHE], [*pieces, out.logits]
    assert largest_difference(whole, torch.cat(pieces, 1)) < FP32
    assert cache.layers[0].keys.shape[1] == 2


@pytest.mark.parametrize("patch", [ap.NoPosition(), ap.Rotary(), ap.Alibi(), ap.Sinusoidal()], ids=lambda p: p.name)
def test_an_encoder_reads_beyond_its_old_table_without_being_told_segments(patch):
    model = tiny_model("bert", encoder=True)
    ap.apply(model, patch)
    assert _logits(model, input_ids=torch.randint(5, 99, (1, 300))).shape[:2] == (1, 300)


# -- models that have rotary modules ----------------------------------------------------------------------------------

_KINDS = [
    ({}, {"rope_type": "default"}),
    ({"kind": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    (
        {"kind": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    (
        {"kind": "llama3", "factor": 4.0},
        {
            **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 128,
        },
    ),
]


@pytest.mark.parametrize(("fields", "parameters"), _KINDS, ids=lambda v: v.get("kind", "default"))
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_another_base_is_what_stock_transformers_builds(model_type, fields, parameters, tmp_path):
    model = tiny_model(model_type)
    ids = tiny_inputs(model)["input_ids"]
    own = {k: v for k, v in model.config.rope_parameters.items() if k == "partial_rotary_factor"}
    longer = {"max_position_embeddings": round(128 * fields.get("factor", 1))}
    stock = tiny_model(model_type, rope_parameters={**own, **parameters, "rope_theta": 500.0}, **longer)
    report = ap.patch_rotary(model, theta=500.0, **fields)
    assert report.stock
    assert torch.equal(_logits(model, input_ids=ids), _logits(stock, input_ids=ids))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__module__.startswith("transformers.")
    assert torch.equal(_logits(again, input_ids=ids), _logits(stock, input_ids=ids))


@pytest.mark.parametrize(("fields", "parameters"), _KINDS, ids=lambda v: v.get("kind", "default"))
def test_a_rotation_of_ours_has_the_frequencies_of_transformers(fields, parameters):
    stock = tiny_model("llama", rope_parameters={**parameters, "rope_theta": 500.0}, max_position_embeddings=512)
    ours = Rotation(500.0, stock.config.head_dim, False, fields.get("kind", "default"), fields.get("factor", 1.0), 128)
    torch.testing.assert_close(ours.frequencies(), stock.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    cos, _ = ours.angles(torch.arange(1)[None])
    assert abs(float(cos[0, 0, 0, 0]) - stock.model.rotary_emb.attention_scaling) < 1e-6


def test_the_base_that_is_there_is_nothing_to_do():
    model = tiny_model("llama")
    before = snapshot(model)
    assert not ap.patch_rotary(model, theta=model.config.rope_parameters["rope_theta"]).changed
    assert snapshot(model) == before


def test_of_nested_parameters_those_of_the_whole_context_change():
    model = tiny_model("gemma3_text")
    before = copy.deepcopy(model.config.rope_parameters)
    report = ap.patch_rotary(model, theta=500.0)
    after = model.config.rope_parameters
    assert after["full_attention"] == {"rope_type": "default", "rope_theta": 500.0}
    assert after["sliding_attention"] == before["sliding_attention"]
    assert "other layer types left alone" in " ".join(str(report).split())
    report.revert()
    ap.patch_rotary(model, theta=500.0, layer_types=["sliding_attention"])
    assert model.config.rope_parameters["sliding_attention"]["rope_theta"] == 500.0
    assert model.config.rope_parameters["full_attention"] == before["full_attention"]


def test_falcon_with_alibi_becomes_a_stock_rotary_falcon(tmp_path):
    model = tiny_model("falcon", alibi=True)
    ids = tiny_inputs(model)["input_ids"]
    assert ap.patch_rotary(model).stock
    assert torch.equal(_logits(model, input_ids=ids), _logits(tiny_model("falcon"), input_ids=ids))


def test_a_table_taken_out_and_rotary_put_back_after_alibi_in_a_loaded_model(tmp_path):
    """Llama to ALiBi, saved, loaded, and back to its own rotary positions: the logits that it began with."""
    model = tiny_model("llama")
    ids = tiny_inputs(model)["input_ids"]
    wanted = _logits(model, input_ids=ids)
    ap.patch_alibi(model)
    model.save_pretrained(tmp_path / "alibi")
    loaded = ap.load(tmp_path / "alibi")
    assert not torch.equal(_logits(loaded, input_ids=ids), wanted)
    ap.patch_rotary(loaded, theta=model.config.rope_parameters["rope_theta"])
    assert torch.equal(_logits(loaded, input_ids=ids), wanted)
    loaded.save_pretrained(tmp_path / "back")
    assert torch.equal(_logits(ap.load(tmp_path / "back"), input_ids=ids), wanted)


def test_a_part_of_each_head():
    model = tiny_model("gpt2")
    ids = tiny_inputs(model)["input_ids"]
    ap.patch_rotary(model, partial=0.5, interleaved=True)
    rotation = rotation_of(model.transformer.h[0].attn)
    assert (rotation.rotary_dim, rotation.interleaved) == (8, True)
    assert _logits(model, input_ids=ids).isfinite().all()
    partial = tiny_model("gpt_neox")
    share = partial.config.rope_parameters["partial_rotary_factor"]
    assert ap.patch_rotary(partial, theta=500.0, partial=share).stock


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("gpt2", {"theta": 0}, "theta is 0"),
        ("gpt2", {"kind": "longrope"}, "choose from: default, linear, yarn, llama3"),
        ("gpt2", {"factor": 2.0}, "belongs to kind="),
        ("gpt2", {"kind": "linear", "factor": 0.5}, "factor is 0.5"),
        ("gpt2", {"partial": 0.2}, "must be an even number|do not make pairs"),
        ("gpt2", {"partial": 2.0}, "at most 1"),
        ("gpt2", {"layer_types": ["full_attention"]}, "layer_types are for models with rotary modules"),
        ("llama", {"interleaved": True}, "its own modules fix which dimensions are paired"),
        ("gpt_neox", {"partial": 1.0}, "own modules rotate 0.25 of each head"),
        ("gemma3_text", {"layer_types": ["none"]}, "has no rotary parameters of its own"),
        ("t5", {}, "reads two sequences|has no"),
    ],
)
def test_bad_arguments_are_refused(model_type, fields, words):
    if model_type == "t5":
        pytest.skip("no causal class")
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.patch_rotary(model, **fields)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"theta": -1}, "theta is -1"),
        ({"amplitude": -0.1}, "amplitude is -0.1"),
        ({"embedding_scale": "big"}, "or 'paper'"),
        ({"embedding_scale": 0}, "embedding_scale is 0"),
    ],
)
def test_bad_arguments_of_the_sinusoid_are_refused(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.Sinusoidal(**fields)


def test_the_sinusoid_scales_embeddings_as_the_paper_does():
    model, scaled = tiny_model("llama"), tiny_model("llama")
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        scaled.model.embed_tokens.weight.mul_(8.0)  # the root of 64
    ap.patch_sinusoidal(model, embedding_scale="paper", amplitude=0.5)
    ap.patch_sinusoidal(scaled, amplitude=0.5)
    assert largest_difference(_logits(scaled, input_ids=ids), _logits(model, input_ids=ids)) < FP32


@pytest.mark.parametrize("one", [ap.Rotary(theta=5.0), ap.Sinusoidal(), ap.NoPosition(), ap.PositionTable(length=200)])
@pytest.mark.parametrize("two", [ap.Alibi(), ap.RopeScaling(kind="yarn", factor=2)])
def test_two_position_patches_at_once_are_a_conflict(one, two):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ap.PatchConflict, match="the positions|config|added|@"):
        ap.apply(model, one, two)
    assert snapshot(model) == before


@pytest.mark.parametrize("first", [ap.Rotary(), ap.Sinusoidal(), ap.NoPosition()], ids=lambda p: p.name)
def test_scaling_on_a_model_without_rotary_modules_says_what_is_there(first):
    model = tiny_model("gpt2")
    ap.apply(model, first)
    with pytest.raises(ap.UnsupportedArchitecture, match=f"positions here are: {ap.describe(model).positions}"):
        ap.patch_rope_scaling(model, kind="yarn", factor=2)


@pytest.mark.parametrize(
    ("model_type", "patch"),
    [
        *(("ctrl", patch) for patch in (ap.NoPosition(), ap.Rotary(), ap.Sinusoidal())),
        ("openai-gpt", ap.Rotary()),  # whose attention is its own
    ],
    ids=str,
)
def test_positions_that_are_not_recognised_are_refused(model_type, patch):
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture):
        ap.apply(model, patch)
    assert snapshot(model) == before


def test_a_table_of_another_name_is_found_by_running():
    """GPT-1 calls its table ``positions_embed``: what adds rows by position is a table, whatever its name."""
    model = tiny_model("openai-gpt")
    same = torch.full((1, 6), 7)
    with torch.no_grad():
        before = model(same).logits
        assert (before[:, 0] - before[:, -1]).abs().max() > 1e-3
        report = ap.patch_no_position(model)
        after = model(same).logits
        assert (after - after[:, :1]).abs().max() < 1e-5 * after.abs().max()  # equal tokens, equal logits
        ap.patch_sinusoidal(model)
        again = model(same).logits
        assert (again[:, 0] - again[:, -1]).abs().max() > 1e-3
    assert "positions_embed" in " ".join(str(report).split())


def test_an_encoder_without_positions_is_told_what_it_is():
    report = ap.patch_no_position(tiny_model("bert", encoder=True))
    assert "bag of tokens" in " ".join(str(report).split())


@pytest.mark.parametrize("patch", [ap.Sinusoidal(), ap.PositionTable(length=64)])
def test_a_decoder_that_counts_no_tokens_is_refused(patch):
    """Mamba's state would put every decoded token at position 0."""
    model = tiny_model("mamba")
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="a state that does not say how many tokens it has seen"):
        ap.apply(model, patch)
    assert snapshot(model) == before
