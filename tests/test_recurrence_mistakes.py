"""What goes wrong with a memory in other people's hands: it is right, or it is an error that says so."""

import copy

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from recurring import built, logits_of, random_ids, with_memory
from tolerances import ROUNDING
from transformers import DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.probe import largest_difference

FP32 = ROUNDING[torch.float32]


def test_heads_are_shared_above_and_beneath_it():
    above, beneath = with_memory(tiny_model("llama")), tiny_model("llama")
    ap.patch_grouped_query(above, num_kv_heads=2, method="mean")
    ap.patch_grouped_query(beneath, num_kv_heads=2, method="mean")
    ids = random_ids(1, 30)
    assert torch.equal(logits_of(above, ids), logits_of(with_memory(beneath), ids))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("positions", ["bounded", "running"])
def test_generate_in_a_stream_goes_on_where_the_stream_is(model_type, positions):
    model, ids = with_memory(built(model_type), positions), random_ids(1, 30)
    with ap.stream(model):
        logits_of(model, ids[:, :20])
        out = model.generate(
            ids[:, 20:], attention_mask=torch.ones(1, 10, dtype=torch.long), max_new_tokens=5, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    whole = torch.cat([ids[:, :20], out.sequences], 1)
    assert largest_difference(logits_of(model, whole)[:, 29:-1], torch.stack(out.logits, 1)) < FP32


@torch.no_grad()
def test_a_cache_that_the_caller_holds_is_filled():
    model, ids, cache = with_memory(tiny_model("llama")), random_ids(2, 40), DynamicCache()
    parts = [model(input_ids=part, **{CACHE: cache}, use_cache=True).logits for part in ids.split(20, 1)]
    assert largest_difference(logits_of(model, ids), torch.cat(parts, 1)) < FP32


@pytest.mark.parametrize("patch", [ap.Sinusoidal(), ap.PositionTable(length=128, init="sinusoidal")])
@pytest.mark.parametrize("positions", ["bounded", "running"])
def test_positions_that_are_added_go_on_in_a_stream(patch, positions):
    model, ids = tiny_model("llama"), random_ids(2, 60)
    ap.apply(model, patch)
    model = with_memory(model, positions)
    with ap.stream(model):
        parts = [logits_of(model, part) for part in ids.split([20, 3, 37], 1)]
    assert largest_difference(logits_of(model, ids), torch.cat(parts, 1)) < FP32


@torch.no_grad()
def test_left_padding_without_positions_where_they_run_on():
    model, ids = with_memory(built("opt"), "running"), random_ids(1, 40)
    wide = torch.cat([torch.full((1, 3), 7), ids], 1)
    mask = torch.ones(1, 43, dtype=torch.long)
    mask[:, :3] = 0
    first = model(input_ids=wide[:, :7], attention_mask=mask[:, :7], use_cache=True)
    then = model(input_ids=wide[:, 7:], attention_mask=mask, **{CACHE: first[CACHE]})
    found = torch.cat([first.logits[:, 3:], then.logits], 1)
    assert largest_difference(logits_of(model, ids), found) < FP32


def test_a_copy_of_a_model_with_an_open_stream_has_none():
    model, ids = with_memory(tiny_model("llama")), random_ids(1, 30)
    wanted = logits_of(model, ids)
    with ap.stream(model):
        logits_of(model, ids)
        copied = copy.deepcopy(model)
    assert torch.equal(wanted, logits_of(copied, ids))
    with ap.stream(copied):
        assert torch.equal(wanted, logits_of(copied, ids))


def test_a_state_of_another_memory_is_refused():
    model, ids = with_memory(tiny_model("llama")), random_ids(1, 30)
    with ap.stream(model) as stream:
        logits_of(model, ids)
        state = stream.state_dict()
    for other in (with_memory(model := tiny_model("llama"), length=16), with_memory(model, sinks=2)):
        with pytest.raises(ap.AttnPatchError, match="load what a stream of the same model returned"):
            ap.stream(other).load_state_dict(state)
    with pytest.raises(ap.AttnPatchError, match="segments is missing"):
        ap.stream(other).load_state_dict({})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"attention_mask": torch.ones(2, 20, dtype=torch.long)}, "2 rows of 30 tokens"),
        ({"attention_mask": torch.ones(1, 30, dtype=torch.long)}, "2 rows of 30 tokens"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
        ({"position_ids": torch.arange(29)[None]}, "position_ids of shape \\(1, 29\\)"),
        ({CACHE: ()}, "the cache is a tuple"),
    ],
)
def test_inputs_of_the_wrong_shape(inputs, words):
    model = with_memory(tiny_model("llama"))
    with pytest.raises(ap.AttnPatchError, match=words):
        logits_of(model, random_ids(2, 30), **inputs)


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_attention_weights_of_a_long_call_are_refused(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    with pytest.raises(ap.AttnPatchError, match="attention weights"):
        with_memory(model)(input_ids=random_ids(1, 30), output_attentions=True)


@torch.no_grad()
def test_a_stream_that_is_reset_under_a_cache():
    model, ids = with_memory(tiny_model("llama")), random_ids(1, 30)
    with ap.stream(model) as stream:
        cache = model(input_ids=ids[:, :20], use_cache=True)[CACHE]
        stream.reset()
        assert cache.get_seq_length() >= 0
        assert torch.equal(logits_of(model, ids), logits_of(with_memory(tiny_model("llama")), ids))
