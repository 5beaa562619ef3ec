"""The Alibi patch on models: what it takes out, what it adds, through every kernel, cache and checkpoint."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from tolerances import ROUNDING
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function, sliding_window_overlay

import hf_attnpatch as ap
from hf_attnpatch.attention import flash
from hf_attnpatch.attention.masks import Unwritten, mask_function, mask_of
from hf_attnpatch.attention.registry import attention_function, set_kernel
from hf_attnpatch.functional import alibi, reference
from hf_attnpatch.probe import default_inputs, largest_difference, trace

FP32 = ROUNDING[torch.float32]
ROPE = ["llama", "qwen2", "gemma3_text", "phi3", "gpt_neox", "cohere2"]
TABLES = ["gpt2", "opt"]
ENCODERS = ["bert", "roberta", "modernbert"]
NATIVE = ["bloom", "mpt"]
ALL = [*((t, False) for t in [*ROPE, *TABLES, *NATIVE]), *((t, True) for t in ENCODERS)]


def _build(model_type, encoder=False, **overrides):
    return tiny_model(model_type, encoder=encoder, **overrides)


def _logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def _oracle(model, ids):
    """A tiny Llama without its angles and with a matrix of biases, written out, in fp64."""
    model = copy.deepcopy(model).double()
    heads, dim = model.config.num_attention_heads, model.config.head_dim
    hidden = model.model.embed_tokens(ids)
    matrix = alibi.bias(alibi.slopes(heads), torch.arange(ids.shape[1]), torch.arange(ids.shape[1]))
    for layer in model.model.layers:
        at, normed = layer.self_attn, layer.input_layernorm(hidden)
        states = [p(normed).unflatten(-1, (-1, dim)).transpose(1, 2) for p in (at.q_proj, at.k_proj, at.v_proj)]
        mask = reference.causal(ids.shape[1], ids.shape[1])
        out, _ = reference.attention(*states, scale=dim**-0.5, bias=matrix, mask=mask)
        hidden = hidden + at.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_a_llama_equals_the_formula_written_out(kv):
    model = _build("llama", num_key_value_heads=kv)
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        wanted = _oracle(model, ids)
    ap.patch_alibi(model)
    assert largest_difference(wanted, _logits(model, input_ids=ids)) < FP32


@pytest.mark.parametrize(("model_type", "encoder"), ALL)
def test_the_report_says_what_went_and_what_came(model_type, encoder):
    model = _build(model_type, encoder)
    before = ap.describe(model)
    report = ap.patch_alibi(model)
    after, text = ap.describe(model), " ".join(str(report).split())
    assert after.alibi
    assert not after.rotary
    assert not after.tables
    assert after.biased == tuple(s.path for s in before.sites)
    for removed in (*(r.path for r in before.rotary), *before.tables):
        assert removed in text
    assert "biases by the paper's slopes" in text
    assert not report.stock


@pytest.mark.parametrize(("model_type", "encoder"), [(t, e) for t, e in ALL if t not in NATIVE])
def test_nothing_of_the_old_positions_is_left(model_type, encoder):
    model = _build(model_type, encoder)
    ids = tiny_inputs(model)["input_ids"]
    elsewhere = torch.arange(24)[None].expand(2, -1) + 40  # no gaps: those would mean packed documents
    try:
        moved = largest_difference(_logits(model, input_ids=ids), _logits(model, input_ids=ids, position_ids=elsewhere))
    except TypeError:
        pytest.skip("its forward takes no position_ids")
    ap.patch_alibi(model)
    assert torch.equal(_logits(model, input_ids=ids), _logits(model, input_ids=ids, position_ids=elsewhere))
    if model_type in TABLES or model_type in ("bert", "roberta"):
        assert moved > 1e-3


@pytest.mark.parametrize(
    ("model_type", "encoder"), [("gpt2", False), ("opt", False), ("bert", True), ("roberta", True)]
)
def test_the_length_of_the_table_is_no_limit_any_more(model_type, encoder):
    model = _build(model_type, encoder)
    ids = torch.randint(5, 99, (1, 300))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)
    ap.patch_alibi(model)
    types = {"token_type_ids": torch.zeros_like(ids)} if encoder else {}  # that buffer is as long as the table was
    assert _logits(model, input_ids=ids, **types).shape[:2] == (1, 300)


@pytest.mark.parametrize(("model_type", "encoder"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_kernel_agrees_with_the_dense_reference(model_type, encoder, dtype):
    if model_type in NATIVE:
        pytest.skip("no registry")
    model = tiny_model(model_type, dtype=dtype, encoder=encoder)
    inputs = default_inputs(model)
    ap.patch_alibi(model, backend="eager")
    wanted = trace(model, inputs).logits
    for name in ("sdpa", "flex_attention") if model._supports_flex_attn else ("sdpa",):
        set_kernel(name).run(model)
        assert largest_difference(wanted, trace(model, inputs).logits) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("model_type", "encoder"), [("llama", False), ("gemma3_text", False), ("bert", True)])
def test_clipped_distances_agree_with_the_dense_reference(model_type, encoder, name):
    model = _build(model_type, encoder)
    inputs = tiny_inputs(model)
    full = copy.deepcopy(model)
    ap.patch_alibi(full)
    ap.patch_alibi(model, backend="eager", distance_clip=5)
    wanted = _logits(model, **inputs)
    set_kernel(name).run(model)
    assert largest_difference(wanted, _logits(model, **inputs)) < FP32
    assert largest_difference(wanted, _logits(full, **inputs)) > 1e-3


def test_soft_capped_scores_go_to_the_kernel_that_has_them():
    model = _build("gemma2")
    report = ap.patch_alibi(model)
    assert "flex_attention on cpu" in str(report)
    wanted = _logits(model, **tiny_inputs(model))
    set_kernel("eager").run(model)
    assert largest_difference(wanted, _logits(model, **tiny_inputs(model))) < FP32
    with pytest.raises(ap.UnsupportedArchitecture, match="backend='eager' computes it"):
        ap.patch_alibi(_build("gemma2"), training=True)


def test_attention_sinks_stand_beside_it():
    """See also test_learned_sinks.py."""
    model = _build("gpt_oss")
    report = ap.patch_alibi(model)
    assert "sdpa on cpu" in str(report)
    wanted = _logits(model, **tiny_inputs(model))
    set_kernel("eager").run(model)
    assert largest_difference(wanted, _logits(model, **tiny_inputs(model))) < FP32


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "bloom"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_equals_forwards_without_a_cache(model_type, cache):
    model = _build(model_type)
    ap.patch_alibi(model)
    inputs = tiny_inputs(model, length=12)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :5] = 0
    kind = {"dynamic": lambda: DynamicCache(config=model.config), "static": lambda: StaticCache(model.config, 40)}[
        cache
    ]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, attention_mask=mask, **{CACHE: kind()}, **options)
    ids = inputs["input_ids"]
    for _ in range(10):
        ids = torch.cat(
            [ids, _logits(model, input_ids=ids, attention_mask=mask, use_cache=False)[:, -1:].argmax(-1)], 1
        )
        mask = torch.cat([mask, mask[:, -1:]], 1)
    assert torch.equal(found, ids)


def test_packed_documents_are_as_if_they_were_alone():
    model = _build("llama")
    ap.patch_alibi(model)
    ids = tiny_inputs(model, batch=1, length=30)["input_ids"]
    places = torch.cat([torch.arange(13), torch.arange(17)])[None]
    packed = _logits(model, input_ids=ids, position_ids=places, use_cache=False)
    alone = [_logits(model, input_ids=part, use_cache=False) for part in (ids[:, :13], ids[:, 13:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model_type", "encoder"), [("llama", False), ("gpt2", False), ("bert", True)])
def test_gradients_are_those_of_the_dense_reference(model_type, encoder):
    model = _build(model_type, encoder).train()
    inputs, gradients = tiny_inputs(model), []
    ap.patch_alibi(model, training=True)
    for name in ("sdpa", "eager"):
        set_kernel(name).run(model)
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for found, wanted in zip(*gradients, strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize(
    ("model_type", "encoder", "field"), [("llama", False, "attention_dropout"), ("bert", True, None)]
)
def test_dropout_in_training(model_type, encoder, field):
    model = _build(model_type, encoder, **{field or "attention_probs_dropout_prob": 0.5}).train()
    ap.patch_alibi(model, training=True)
    inputs = tiny_inputs(model)
    assert not torch.equal(_logits(model, **inputs), _logits(model, **inputs))
    model(**inputs).logits.mean().backward()
    model.eval()
    assert torch.equal(_logits(model, **inputs), _logits(model, **inputs))


# -- slopes, strength, rounding ---------------------------------------------------------------------------------------


def test_given_slopes_count_and_none_leaves_no_positions():
    model, inputs = _build("llama"), None
    inputs = tiny_inputs(model)
    found = {}
    for name, slopes in {
        "paper": "paper",
        "same": alibi.slopes(4),
        "list": alibi.slopes(4).tolist(),
        "flat": [0.0] * 4,
    }.items():
        twin = copy.deepcopy(model)
        ap.patch_alibi(twin, slopes=slopes)
        found[name] = _logits(twin, **inputs)
    assert torch.equal(found["paper"], found["same"])
    assert torch.equal(found["paper"], found["list"])
    assert largest_difference(found["paper"], found["flat"]) > 1e-2
    weak = copy.deepcopy(model)
    ap.patch_alibi(weak, strength=0.0)
    assert torch.equal(_logits(weak, **inputs), found["flat"])


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_strength_is_set_on_the_way_and_saved(model_type, tmp_path):
    model = _build(model_type)
    inputs = tiny_inputs(model)
    ap.patch_alibi(model, strength=0.0)
    nothing = _logits(model, **inputs)
    steps = []
    for step in range(5):
        ap.set_alibi_strength(model, min(1.0, step / 3))
        steps.append(_logits(model, **inputs))
    assert torch.equal(steps[0], nothing)
    assert torch.equal(steps[3], steps[4])
    assert not torch.equal(steps[1], steps[2])
    ap.set_alibi_strength(model, 1 / 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path), **inputs), steps[1])
    fresh = _build(model_type)
    ap.patch_alibi(fresh)
    assert torch.equal(_logits(fresh, **inputs), steps[3])


def test_strength_of_a_copy_is_its_own():
    model = _build("llama")
    report = ap.patch_alibi(model)
    twin = copy.deepcopy(model)
    ap.set_alibi_strength(twin, 0.5)
    inputs = tiny_inputs(model)
    assert not torch.equal(_logits(model, **inputs), _logits(twin, **inputs))
    ap.set_alibi_strength(model, 0.5)
    assert torch.equal(_logits(model, **inputs), _logits(twin, **inputs))
    report.revert()
    with pytest.raises(ap.AttnPatchError, match="apply patch_alibi first"):
        ap.set_alibi_strength(model, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounded_positions_give_bloom_its_own_logits(dtype):
    model = tiny_model("bloom", dtype=dtype)
    inputs = default_inputs(model)
    wanted = trace(model, inputs).logits
    ap.patch_alibi(model, exact=False)
    assert largest_difference(wanted, trace(model, inputs).logits) < ROUNDING[dtype]


def test_exact_positions_differ_from_rounded_ones_where_they_should():
    """BLOOM in bf16 far from the start: its positions are off by whole tokens, the exact ones are not."""
    ids = torch.randint(5, 99, (1, 700))
    stock = tiny_model("bloom")
    truth = _logits(stock, input_ids=ids)
    errors = {}
    for exact in (False, True):
        model = tiny_model("bloom", dtype=torch.bfloat16)
        ap.patch_alibi(model, exact=exact)
        errors[exact] = largest_difference(truth, _logits(model, input_ids=ids))
    assert errors[True] < errors[False]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slopes": "mine"}, "choose 'paper'"),
        ({"slopes": 3}, "one number for each query head"),
        ({"slopes": []}, "slopes are empty"),
        ({"slopes": [0.5, 0.25]}, "2 slopes for 4 query heads"),
        ({"backend": "fast"}, "choose from auto"),
        ({"backend": "flash_attention_2"}, "needs a CUDA device"),
        ({"distance_clip": 0}, "at least 1"),
        ({"distance_clip": 2.5}, "number of tokens"),
        ({"strength": -1}, "0 or more"),
    ],
)
def test_bad_arguments_are_refused(fields, words):
    model = _build("llama")
    before = _logits(model, **tiny_inputs(model))
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.patch_alibi(model, **fields)
    assert torch.equal(_logits(model, **tiny_inputs(model)), before)


@pytest.mark.parametrize("model_type", ["ctrl", "openai-gpt", "trocr"])
def test_families_whose_positions_are_inside_are_refused(model_type):
    with pytest.raises(ap.AttnPatchError):
        ap.patch_alibi(_build(model_type))


def test_a_family_that_reads_its_mask_reads_who_sees_whom():
    """DeepSeek-V3.2 picks keys by the mask itself: padding alone, as other modules get it, would let it look ahead."""
    model = tiny_model("deepseek_v32")
    ap.patch_alibi(model)
    ids = torch.randint(5, 99, (1, 60), generator=torch.Generator().manual_seed(0))
    whole = _logits(model, input_ids=ids)
    assert largest_difference(whole[:, :40], _logits(model, input_ids=ids[:, :40])) < FP32
    set_kernel("eager").run(model)
    assert largest_difference(whole, _logits(model, input_ids=ids)) < FP32


def test_a_mask_that_nobody_looks_into_is_not_written():
    asked = {"batch_size": 2, "q_length": 5, "kv_length": 5, "q_offset": 0, "device": "cpu"}
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    mask = mask_function("sdpa")(**asked, attention_mask=keep, mask_function=causal_mask_function)
    assert isinstance(mask, Unwritten)
    assert mask.made.told.shape == (2, 1, 1, 5)
    assert (mask.shape, mask.dtype, mask.dim(), mask.device.type) == ((2, 1, 5, 5), torch.bool, 4, "cpu")
    assert mask.to("cpu") is mask.contiguous() is mask
    assert mask_of(mask.to("meta")) is mask.made
    assert "whole" not in mask.made._forms
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & keep[:, None, None]
    for found in (mask[:, :, :], mask & True, torch.cat([mask]), mask.clone()):
        assert type(found) is torch.Tensor
        assert torch.equal(found[seen.any(-1)], seen[seen.any(-1)])


def test_twice_is_refused_and_so_are_two_schemes_at_once():
    model = _build("llama")
    with pytest.raises(ap.PatchConflict, match="the positions"):
        ap.apply(model, ap.Alibi(), ap.RopeScaling(kind="yarn", factor=2))
    ap.patch_alibi(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="ALiBi already"):
        ap.patch_alibi(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="positions here are: alibi"):
        ap.patch_rope_scaling(model, kind="yarn", factor=2)


def test_a_kernel_that_is_chosen_later_keeps_the_bias():
    model = _build("llama")
    ap.patch_alibi(model)
    wanted = _logits(model, **tiny_inputs(model))
    for kernel in ("eager", "sdpa", "attnpatch_eager"):
        model.set_attn_implementation(kernel)
        assert largest_difference(wanted, _logits(model, **tiny_inputs(model))) < FP32
        assert model.config._attn_implementation == f"attnpatch_{kernel.removeprefix('attnpatch_')}"


def test_an_attention_function_that_would_drop_the_bias_is_stopped():
    model = _build("llama")
    ap.patch_alibi(model)
    model.config._attn_implementation = "paged|sdpa"  # of transformers' own, and not one of ours
    with pytest.raises(ap.AttnPatchError, match="knows nothing of this model's alibi, and would drop it"):
        model.model.layers[0].self_attn(torch.zeros(1, 3, 64))


def test_a_mask_that_looks_ahead_is_refused():
    model = _build("llama")
    ap.patch_alibi(model)
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    mask[:, :, 3:6, 3:6] = True
    with pytest.raises(ap.AttnPatchError, match="see tokens after them"):
        model(**tiny_inputs(model), attention_mask=mask)


# -- checkpoints ------------------------------------------------------------------------------------------------------

_STOCK = """
import sys, json, transformers
found = {}
for name, cls in (("auto", "AutoModelForCausalLM"), ("class", sys.argv[2])):
    try:
        getattr(transformers, cls).from_pretrained(sys.argv[1])
        found[name] = "loaded"
    except Exception as error:
        found[name] = type(error).__name__ + " " + " ".join(str(error).split())
print(":" + json.dumps(found))
"""


@pytest.mark.parametrize(("model_type", "cls"), [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_stock_transformers_refuses_the_checkpoint(model_type, cls, tmp_path):
    model = _build(model_type)
    ap.patch_alibi(model, distance_clip=9)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attnpatch"]["patches"][0]["distance_clip"] == 9
    run = [sys.executable, "-W", "ignore", "-c", _STOCK, str(tmp_path), cls]
    out = subprocess.run(run, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    found = json.loads(out[out.index(":{") + 1 :])
    assert "loaded" not in found.values()
    assert "trust_remote_code" in found["auto"]
    assert "hf_attnpatch" in found["class"]


@pytest.mark.parametrize("attention", [None, "eager", "flex_attention"])
def test_a_checkpoint_takes_the_kernel_that_is_asked_for(attention, tmp_path):
    model = _build("llama")
    ap.patch_alibi(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert again.config._attn_implementation == f"attnpatch_{attention or 'sdpa'}"
    assert largest_difference(_logits(model, **tiny_inputs(model)), _logits(again, **tiny_inputs(model))) < FP32


# -- flash attention, by functions that stand in for the library ------------------------------------------------------


class _Library:
    """Computes what flash-attn says that it computes, and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(self, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes):
        self.calls.append(alibi_slopes)
        here, keys = torch.arange(k.shape[1] - q.shape[1], k.shape[1]), torch.arange(k.shape[1])
        matrix = alibi.bias(alibi_slopes.double(), here, keys)
        mask = reference.causal(q.shape[1], k.shape[1]) if causal else torch.ones(1, 1, dtype=torch.bool)
        gap = keys - here[:, None]  # "keys between [i + k - q - window_size[0], i + k - q + window_size[1]] inclusive"
        for reach, ahead in zip(window_size, (-gap, gap), strict=True):
            mask = mask if reach < 0 else mask & (ahead <= reach)
        states = [t.transpose(1, 2) for t in (q, k, v)]
        out, _ = reference.attention(*states, scale=softmax_scale, bias=matrix, mask=mask)
        return out.to(q.dtype).transpose(1, 2)


def _plain(q, k, v, mask, *, query_length, is_causal, softmax_scale, attn_implementation, **_):
    """Transformers' own way to the library, without any bias."""
    assert attn_implementation.startswith("flash_attention_")
    seen = reference.causal(q.shape[1], k.shape[1])[None, None] if is_causal else torch.ones(1, 1, 1, 1).bool()
    seen = seen if mask is None else seen & mask[:, None, None].bool()
    states = [t.transpose(1, 2) for t in (q, k, v)]
    out, _ = reference.attention(*states, scale=softmax_scale, mask=seen)
    return out.nan_to_num().to(q.dtype).transpose(1, 2)


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv", [4, 2])
def test_flash_attention_gets_slopes_or_columns(version, padded, kv, monkeypatch):
    library = _Library()
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(flash, "_flash_attention_forward", _plain)
    model = _build("llama", num_key_value_heads=kv)
    ap.patch_alibi(model, backend="eager")
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 20, 16, generator=generator) for n in (4, kv, kv))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    mask = mask if padded else None
    function = attention_function(f"flash_attention_{version}")
    found, _ = function(module, query, key, value, mask, scaling=0.25)
    matrix = alibi.bias(alibi.slopes(4), torch.arange(20), torch.arange(20))
    seen = reference.causal(20, 20)[None, None]
    seen = seen if mask is None else seen & mask[:, None, None].bool()
    wanted, _ = reference.attention(query, key, value, scale=0.25, bias=matrix, mask=seen)
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted.nan_to_num(), rtol=0, atol=1e-5)
    assert bool(library.calls) == (version == 2 and not padded)


@pytest.mark.parametrize(
    ("version", "fields", "options", "words"),
    [
        (3, {}, {"is_causal": False}, "attention is bidirectional"),
        (2, {"distance_clip": 4}, {}, "clipped"),
        (2, {"exact": False}, {}, "rounded"),
        (4, {}, {"softcap": 30.0}, "soft-capped"),
        (2, {}, {"s_aux": torch.zeros(4)}, "sinks"),
    ],
)
def test_what_flash_attention_cannot_do_is_said(version, fields, options, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", _Library())
    model = _build("llama")
    ap.patch_alibi(model, backend="eager", **fields)
    states = [torch.randn(1, 4, 6, 16) for _ in range(3)]
    with pytest.raises(ap.AttnPatchError, match=words):
        attention_function(f"flash_attention_{version}")(model.model.layers[0].self_attn, *states, None, **options)


@pytest.mark.parametrize("window", [1, 5, 19, 20, 21, None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [20, 3])
def test_flash_attention_2_has_transformers_windows(window, causal, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", _Library())
    model = _build("llama")
    ap.patch_alibi(model, backend="eager")
    states = [torch.randn(1, 4, n, 16) for n in (queries, 20, 20)]
    here, keys = torch.arange(20 - queries, 20)[:, None], torch.arange(20)
    seen = keys <= here if causal else torch.ones(1, 1, dtype=torch.bool)
    if window is not None:
        seen = seen & sliding_window_overlay(window)(0, 0, here, keys)
        seen = seen if causal else seen & (keys < here + window)  # as far ahead
    found, _ = attention_function("flash_attention_2")(
        model.model.layers[0].self_attn, *states, None, scaling=0.25, is_causal=causal, sliding_window=window
    )
    matrix = alibi.bias(alibi.slopes(4), here[:, 0], keys)
    wanted, _ = reference.attention(*states, scale=0.25, bias=matrix, mask=seen[None, None])
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted, rtol=0, atol=1e-5)


def test_flash_attention_2_looks_both_ways_by_itself(monkeypatch):
    library = _Library()
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    model = _build("bert", True)
    ap.patch_alibi(model, backend="eager")
    module = model.get_submodule(ap.describe(model).biased[0])
    states = [torch.randn(1, 4, 12, 16) for _ in range(3)]
    found, _ = attention_function("flash_attention_2")(module, *states, None, is_causal=False)
    matrix = alibi.bias(alibi.slopes(4), torch.arange(12), torch.arange(12))
    wanted, _ = reference.attention(*states, scale=0.25, bias=matrix)
    torch.testing.assert_close(found.transpose(1, 2).double(), wanted, rtol=0, atol=1e-5)
