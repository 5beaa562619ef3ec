"""A memory in models some of whose layers see a window only: each layer its own share of it."""

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from recurring import L, M, logits_of, random_ids, with_memory
from tolerances import ROUNDING

import hf_attnpatch as ap
from hf_attnpatch.functional.segments import Segments
from hf_attnpatch.probe import largest_difference
from hf_attnpatch.recurrence.attention import recurrent_of

FP32 = ROUNDING[torch.float32]
MIXED = ["gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss", "exaone4"]
ALONE = ["mistral", "ministral"]  # every layer has the window


def _masks(model, ids, window, sinks):
    whole = Segments(L, M, sinks).mask(ids.shape[1])
    places = torch.arange(ids.shape[1])
    near = whole & (places[:, None] - places < window)
    masks = [m[None, None].expand(len(ids), 1, -1, -1) for m in (whole, near)]
    if model.config._attn_implementation == "eager":
        masks = [torch.zeros(()).masked_fill(~m, torch.finfo(torch.float32).min) for m in masks]
    return masks


@torch.no_grad()
def _dense(model, ids, window, sinks=0):
    whole, near = _masks(model, ids, window, sinks)
    mask = near if model.config.model_type in ALONE else {"full_attention": whole, "sliding_attention": near}
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("window", [5, 11, 64])
@pytest.mark.parametrize("model_type", [*MIXED, *ALONE])
def test_every_layer_sees_its_window_of_the_memory(model_type, window):
    model = tiny_model(model_type, sliding_window=window, max_position_embeddings=512)
    ids = random_ids(2, 60)
    wanted = _dense(model, ids, window)
    patched = with_memory(model)
    found = {recurrent_of(patched.get_submodule(s.path)).window for s in ap.describe(patched).sites}
    assert found == ({window} if model_type in ALONE else {None, window})
    assert largest_difference(wanted, logits_of(patched, ids)) < FP32
    with ap.stream(patched):
        parts = [logits_of(patched, ids[:, a:b]) for a, b in [(0, 5), (5, 6), (6, 25), (25, 60)]]
    assert largest_difference(wanted, torch.cat(parts, 1)) < FP32


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_kernels_agree(kernel):
    model, ids = tiny_model("gemma3_text", sliding_window=11), random_ids(2, 43)
    wanted = logits_of(with_memory(model), ids)
    model.set_attn_implementation(kernel)
    assert largest_difference(wanted, logits_of(with_memory(model), ids)) < FP32


@torch.no_grad()
def test_left_padded_rows_decode_as_they_do_alone():
    model = with_memory(tiny_model("gemma3_text", sliding_window=11))
    ids, pads = random_ids(2, 45), (0, 5)
    wide = torch.stack([torch.cat([torch.full((p,), 7), row[: 45 - p]]) for p, row in zip(pads, ids, strict=True)])
    mask = torch.stack([torch.arange(45) >= p for p in pads]).long()
    places, cache, parts = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for a, b in [(0, 20), *((i, i + 1) for i in range(20, 45))]:
        given = {"attention_mask": mask[:, :b], "position_ids": places[:, a:b], CACHE: cache}
        out = model(input_ids=wide[:, a:b], use_cache=True, **given)
        cache = out[CACHE]
        parts.append(out.logits)
    for row, p in enumerate(pads):
        alone = logits_of(model, ids[row : row + 1, : 45 - p])
        assert largest_difference(alone, torch.cat(parts, 1)[row : row + 1, p:]) < FP32


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "mistral", "gpt_oss"])
def test_invariants(model_type):
    model = tiny_model(model_type)
    before = {f.invariant for f in ap.verify(model).findings if f.outcome == "fail"}
    found = ap.verify(with_memory(model))
    assert {f.invariant for f in found.findings if f.outcome == "fail"} <= before, str(found)


def test_sinks_are_for_layers_that_see_everything():
    """With the true distances of `running`: a windowed layer sees a sink only where its window reaches it."""
    model = tiny_model("gemma3_text", sliding_window=11, max_position_embeddings=512)
    ids = random_ids(2, 60)
    wanted = _dense(model, ids, 11, sinks=3)
    assert largest_difference(wanted, _dense(model, ids, 11)) > 1e-4
    assert largest_difference(wanted, logits_of(with_memory(model, "running", sinks=3), ids)) < FP32
