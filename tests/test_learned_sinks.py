"""Families with learned sinks, which transformers computes eagerly, through torch's flash kernel."""

import pytest
import torch
from architectures import randomise, tiny_config, tiny_inputs, tiny_model
from caches import CACHE
from transformers import AutoModelForTokenClassification, DynamicCache, StaticCache

import hf_attnpatch as ap
from hf_attnpatch.attention import masks
from hf_attnpatch.attention.registry import TORCH, set_kernel
from hf_attnpatch.positions.sinks import passes_sinks
from hf_attnpatch.probe import largest_difference

CAUSAL = ["gpt_oss", "granite_swa", "granitemoe_swa", "flint", "mimo_v2_flash"]
TYPES = [*CAUSAL, "openai_privacy_filter"]
DISTANCES = ["gpt_oss", "granite_swa", "granitemoe_swa"]  # with layers that rotate and look back at everything


def build(model_type, dtype=torch.float32):
    if model_type != "openai_privacy_filter":
        return tiny_model(model_type, dtype=dtype)
    model = AutoModelForTokenClassification.from_config(tiny_config(model_type)).to(dtype).eval()
    randomise(model)
    return model


def padded(model, length=24, left=5):
    inputs = tiny_inputs(model, length=length)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :left] = 0
    return {**inputs, "attention_mask": mask}


def answers(model, inputs):
    """Logits at tokens, and gradients of all parameters."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    logits.log_softmax(-1)[:, 3].sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def sinks_of(gradients):
    return [name for name in gradients if name.endswith(("sinks", "sink_bias", "attention_sink_bias"))]


@pytest.mark.parametrize("tile", [4, 256])
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_and_gradients_are_those_of_eager_attention(model_type, tile, monkeypatch):
    monkeypatch.setattr(masks, "TILE", tile)
    model = build(model_type)
    inputs = padded(model)
    logits, gradients = answers(model, inputs)
    report = ap.patch_flash(model, training=True)
    assert model.config._attn_implementation == TORCH
    assert "sdpa on cpu" in str(report)
    found, mine = answers(model, inputs)
    assert sinks_of(mine)
    assert largest_difference(logits, found) < 1e-5
    assert mine.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert (wanted - mine[name]).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max())), name
    assert all(mine[name].abs().max() > 0 for name in sinks_of(mine))
    report.revert()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(answers(model, inputs)[0], logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_decoding_goes_on_as_eager_attention_does(model_type, cache):
    model = build(model_type)
    inputs = padded(model, length=12)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run():
        made = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 40)
        kept = {"return_dict_in_generate": True, "output_logits": True}
        return model.generate(**inputs, **{CACHE: made}, **options, **kept)

    wanted = run()
    ap.patch_flash(model)
    found = run()
    assert torch.equal(wanted.sequences, found.sequences)
    for one, other in zip(wanted.logits, found.logits, strict=True):
        assert largest_difference(one, other) < 1e-5


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("patch", [ap.Alibi, ap.RelativeXl], ids=lambda p: p.name)
def test_new_positions_beside_sinks(model_type, patch):
    model, dense = build(model_type), build(model_type)
    inputs = padded(model)
    ap.apply(model, patch(backend="sdpa", training=True))
    ap.apply(dense, patch(backend="eager", training=True))
    if patch is ap.RelativeXl:
        dense.load_state_dict(model.state_dict())
    (wanted, gradients), (found, mine) = answers(dense, inputs), answers(model, inputs)
    assert largest_difference(wanted, found) < 1e-5
    for name in sinks_of(gradients):
        assert (gradients[name] - mine[name]).abs().max() < 1e-5 * max(1.0, float(gradients[name].abs().max()))


@pytest.mark.parametrize("model_type", DISTANCES)
@pytest.mark.parametrize(
    "patch",
    [
        lambda backend: ap.SelfExtend(window=4, group=4, trained_length=12, backend=backend),
        lambda backend: ap.DualChunk(chunk=8, trained_length=12, backend=backend),
        lambda backend: ap.AttentionSinks(num_sinks=2, window=6, trained_length=12, backend=backend),
    ],
    ids=["self_extend", "dual_chunk", "attention_sinks"],
)
def test_distances_beside_sinks(model_type, patch):
    model, dense = build(model_type), build(model_type)
    inputs = padded(model, length=30)
    ap.apply(model, patch("sdpa"))
    ap.apply(dense, patch("eager"))
    (wanted, gradients), (found, mine) = answers(dense, inputs), answers(model, inputs)
    assert largest_difference(wanted, found) < 1e-5
    for name in sinks_of(gradients):
        assert (gradients[name] - mine[name]).abs().max() < 1e-5 * max(1.0, float(gradients[name].abs().max()))


@pytest.mark.parametrize("model_type", ["gpt_oss", "granite_swa"])
def test_a_memory_over_the_fused_kernel(model_type):
    model, dense = build(model_type), build(model_type)
    memory = ap.SegmentRecurrence(segment_length=8, memory_length=8)
    inputs = padded(model, length=30)
    ap.apply(dense, memory)
    ap.apply(model, ap.Flash(), memory)
    assert model.config._attn_implementation == TORCH
    (wanted, gradients), (found, mine) = answers(dense, inputs), answers(model, inputs)
    assert largest_difference(wanted, found) < 1e-5
    for name in sinks_of(gradients):
        assert (gradients[name] - mine[name]).abs().max() < 1e-5 * max(1.0, float(gradients[name].abs().max()))


def test_a_window_is_not_written_out(monkeypatch):
    """No tile holds more than the keys that its queries see."""
    monkeypatch.setattr(masks, "TILE", 16)
    seen = []
    made = masks.AttentionMask.tiles
    monkeypatch.setattr(masks.AttentionMask, "tiles", lambda mask: seen.append(mask) or made(mask))
    model = build("granite_swa")  # a window of 8
    ap.patch_flash(model)
    seen.clear()
    model(**tiny_inputs(model, length=64))
    windows = tuple(seen)
    tiles = [tile for mask in windows for tile in mask.tiles()]
    assert tiles
    assert max(tile.columns[1] - tile.columns[0] for tile in tiles) == 16 + 8 - 1
    assert sum(tile.seen.numel() for tile in windows[0].tiles()) == 2 * 16 * (16 + 3 * 23)
    assert not any("whole" in mask._forms for mask in windows)


def test_dropout_takes_weights_of_keys_only():
    """The same draws give what eager attention gives: both drop after the softmax."""
    model = build("granite_swa").train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    inputs, found = tiny_inputs(model), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(model(**inputs, use_cache=False).logits)
        set_kernel("sdpa").run(model)
    assert largest_difference(found[0].detach(), found[1].detach()) < 1e-5


def test_only_families_that_pass_sinks_are_given_a_kernel_that_they_do_not_declare():
    for model_type, there in (("gpt_oss", True), ("llama", False)):
        model = build(model_type)
        assert passes_sinks(model, ap.describe(model).dispatching) is there


def test_a_graph_has_the_sinks_in_it():
    model = build("granite_swa")
    inputs = padded(model, length=16)
    wanted = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    set_kernel("sdpa").run(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    assert largest_difference(wanted, found) < 1e-5
