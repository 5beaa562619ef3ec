"""First tokens that stay in a memory: against masks written out, against recomputation, in streams and checkpoints."""

import copy

import pytest
import torch
from caches import CACHE
from recurring import L, M, built, logits_of, random_ids, under_the_mask, with_memory
from tolerances import ROUNDING
from transformers import AutoModelForCausalLM, DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.functional.segments import Segments
from hf_attnpatch.probe import largest_difference
from recipes.loop import recompute

FP32 = ROUNDING[torch.float32]
S = 3
WITHOUT_TURNING = [("gpt2", "bounded"), ("gpt2", "running"), ("llama", "running"), ("gptj", "running")]


@pytest.mark.parametrize(("length", "memory", "sinks"), [(4, 3, 2), (4, 0, 1), (1, 2, 3), (40, 8, 2), (4, 3, 9)])
def test_the_mask_is_what_a_loop_says(length, memory, sinks):
    found = Segments(length, memory, sinks).mask(30)
    for i in range(30):
        begin = i // length * length
        for j in range(30):
            assert bool(found[i, j]) == (j <= i and (j < sinks or j >= begin - memory)), (i, j)


@pytest.mark.parametrize(("model_type", "positions"), WITHOUT_TURNING)
def test_calls_of_any_length_equal_the_dense_mask(model_type, positions):
    model, ids = built(model_type), random_ids(2, 70)
    wanted = under_the_mask(model, ids, positions, sinks=S)
    assert largest_difference(wanted, under_the_mask(model, ids, positions)) > 1e-3
    model = with_memory(model, positions, sinks=S)
    assert largest_difference(wanted, logits_of(model, ids)) < FP32
    with ap.stream(model):
        parts = [logits_of(model, ids[:, a:b]) for a, b in [(0, 2), (2, 3), (3, 25), (25, 25 + 2 * L), (41, 70)]]
    assert largest_difference(wanted, torch.cat(parts, 1)) < FP32


def _turned(keys, by, frequencies):
    """Keys of Llama, rotated further by so many positions each: halves, as its modeling file rotates them."""
    angles = by[:, None].double() * frequencies.double()
    cos, sin = (f(torch.cat([angles, angles], -1)).to(keys.dtype) for f in (torch.cos, torch.sin))
    half = keys.shape[-1] // 2
    return keys * cos + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin


def _recomputed(model, ids):
    """Logits, segment by segment, through transformers' own cache: sinks stand right before the memory."""
    logits, kept = [], []
    for start in range(0, ids.shape[1], L):
        low = max(0, start - M)
        sinks = min(S, low)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kept):
            by = torch.arange(low - S, low - S + sinks).clamp(min=torch.arange(sinks)) - torch.arange(sinks)
            near = _turned(keys[:, :, :sinks], by, model.model.rotary_emb.inv_freq)
            cache.update(
                torch.cat([near, keys[:, :, low:]], 2), torch.cat([values[:, :, :sinks], values[:, :, low:]], 2), layer
            )
        held = cache.get_seq_length()
        mask = torch.ones(L, held + L, dtype=torch.bool).tril(held)[None, None].expand(len(ids), 1, -1, -1)
        part = ids[:, start : start + L]
        places = torch.arange(start, start + part.shape[1])[None]
        mask = mask[:, :, : part.shape[1], : held + part.shape[1]]
        out = model(input_ids=part, attention_mask=mask, position_ids=places, **{CACHE: cache})
        logits.append(out.logits)
        new = [(layer.keys[:, :, held:].detach(), layer.values[:, :, held:].detach()) for layer in out[CACHE].layers]
        kept = [
            tuple(torch.cat([a, b], 2) for a, b in zip(one, two, strict=True))
            for one, two in zip(kept or [(t[:, :, :0], t[:, :, :0]) for t, _ in new], new, strict=True)
        ]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kv", [1, 4])
def test_rotated_sinks_equal_recomputation_with_stop_gradient(kv):
    model, ids = built("llama", num_hidden_layers=3, num_key_value_heads=kv), random_ids(2, 12 * L)
    patched = with_memory(model, sinks=S)
    wanted, found = _recomputed(model, ids), patched(input_ids=ids, use_cache=False).logits
    assert largest_difference(wanted, found) < FP32
    wanted.square().sum().backward()
    found.square().sum().backward()
    for (name, one), two in zip(model.named_parameters(), patched.parameters(), strict=True):
        assert largest_difference(one.grad, two.grad) < FP32, name


@pytest.mark.parametrize(("model_type", "positions"), [("llama", "bounded"), *WITHOUT_TURNING])
@torch.no_grad()
def test_rows_that_stand_differently_equal_the_same_rows_alone(model_type, positions):
    model = with_memory(built(model_type), positions, sinks=S)
    ids, pads = random_ids(3, 60), (0, 3, 7)
    wide = torch.stack([torch.cat([torch.full((p,), 7), row[: 60 - p]]) for p, row in zip(pads, ids, strict=True)])
    mask = torch.stack([torch.arange(60) >= p for p in pads]).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts = None, []
    for a, b in [(0, 30), (30, 31), (31, 50), *((i, i + 1) for i in range(50, 60))]:
        out = model(
            input_ids=wide[:, a:b], attention_mask=mask[:, :b], position_ids=places[:, a:b],
            **{CACHE: cache}, use_cache=True,
        )  # fmt: skip
        cache = out[CACHE]
        parts.append(out.logits)
    found = torch.cat(parts, 1)
    for row, p in enumerate(pads):
        assert largest_difference(logits_of(model, ids[row : row + 1, : 60 - p]), found[row : row + 1, p:]) < FP32


def test_a_row_that_is_reset_gets_sinks_of_its_next_document():
    model = with_memory(built("llama"), sinks=S)
    one, two, three = random_ids(1, 48, seed=1), random_ids(1, 24, seed=2), random_ids(1, 24, seed=3)
    with ap.stream(model) as stream:
        first = logits_of(model, torch.cat([one[:, :24], two]))
        stream.reset([1])
        second = logits_of(model, torch.cat([one[:, 24:], three]))
        state = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
        last = logits_of(model, torch.cat([one[:, :8], two[:, :8]]))
    found = torch.cat([first[:1], second[:1]], 1)
    assert largest_difference(logits_of(model, one), found) < FP32
    assert largest_difference(logits_of(model, two), first[1:]) < FP32
    assert largest_difference(logits_of(model, three), second[1:]) < FP32
    again = copy.deepcopy(model)
    with (stream := ap.stream(again)):
        stream.load_state_dict(state)
        assert torch.equal(last, logits_of(again, torch.cat([one[:, :8], two[:, :8]])))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_generate_holds_them_in_constant_memory(model_type):
    model, prompt = with_memory(built(model_type), sinks=S), random_ids(1, 11)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False, use_cache=True,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    assert max(layer.keys.shape[2] for layer in out[CACHE].layers) < L + M + S
    assert torch.equal(logits_of(model, out.sequences[:, :-1])[:, 10:].argmax(-1), out.sequences[:, 11:])
    beams = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    prompt = random_ids(2, 30)
    kinds = [
        model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=c, **beams) for c in (True, False)
    ]
    assert torch.equal(*kinds)


def test_gradient_checkpointing_meets_the_same_sinks():
    found = []
    for checkpointing in (False, True):
        model = with_memory(built("llama"), sinks=S).train()
        if checkpointing:
            recompute(model)
        with ap.stream(model):
            sum(
                model(input_ids=part).logits.square().mean() for part in random_ids(2, 8 * L).split(3 * L, 1)
            ).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpoints_remember_them_and_invariants_hold(tmp_path):
    model, ids = with_memory(built("llama"), sinks=S), random_ids(2, 60)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(model, ids), logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids))
    found = ap.verify(model)
    assert found.passed, str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_a_segment_nothing_changes(dtype):
    model, ids = built("llama").to(dtype), random_ids(2, 40)
    assert torch.equal(logits_of(model, ids), logits_of(with_memory(model, length=64, sinks=S), ids))


@pytest.mark.parametrize("alibi", [True, "xl"])
def test_scores_that_depend_on_distance_have_no_place_for_them(alibi):
    with pytest.raises(ap.UnsupportedArchitecture, match="num_sinks=0"):
        with_memory(built("llama", alibi), sinks=S)
    with pytest.raises(ap.UnsupportedArchitecture, match="num_sinks=0"):
        with_memory(built("bloom"), sinks=S)
