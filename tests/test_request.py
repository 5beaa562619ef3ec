"""A factor for each request and row: the bits of a model scaled by that factor, whatever stands beside or before it."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from snapshot import snapshot
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import hf_attnpatch as ap
from hf_attnpatch.invariants.training import _checkpoint
from hf_attnpatch.rope.request_angles import RequestAngles

WINDOW, FACTOR = 32, 4.0
KINDS = ("linear", "ntk", "ntk_by_parts", "yarn", "llama3", "resonance", "clipped")
TOKENS = torch.randint(5, 99, (3, 80), generator=torch.Generator().manual_seed(1))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _model(model_type="llama", **more):
    return tiny_model(model_type, max_position_embeddings=WINDOW, **more).requires_grad_(False)


def _patched(kind="yarn", model_type="llama", factor=FACTOR, **more):
    model = _model(model_type)
    ap.patch_rope_scaling(model, kind=kind, factor=factor, per_request=True, **more)
    return model


def _statically(kind, length, model_type="llama"):
    model = _model(model_type)
    ap.patch_rope_scaling(model, kind=kind, factor=length / WINDOW)
    return model


def _batch(lengths, width=None):
    """Left-padded rows of these lengths, each the end of its tokens, as ``generate`` passes them."""
    width = width or max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    ids = TOKENS[: len(lengths), :width] * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_request_has_the_bits_of_a_model_scaled_by_its_factor(kind):
    model = _patched(kind)
    for length in (40, 80):
        wanted = _statically(kind, length)(TOKENS[:, :length]).logits
        assert torch.equal(model(TOKENS[:, :length]).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "dynamic", "dynamic_yarn", "longrope"])
def test_a_request_within_the_window_has_the_bits_of_the_base_model(kind, dtype):
    base, model = _model(dtype=dtype), _model(dtype=dtype)
    ap.patch_rope_scaling(model, kind=kind, factor=FACTOR, per_request=True)
    assert torch.equal(model(TOKENS[:, :WINDOW]).logits, base(TOKENS[:, :WINDOW]).logits)
    assert not torch.equal(model(TOKENS).logits, base(TOKENS).logits)
    beside = _batch([WINDOW, 60])
    wanted = base(**beside).logits[0, -WINDOW:]
    assert torch.equal(model(**beside).logits[0, -WINDOW:], wanted)


def test_dynamic_is_its_formula_with_the_length_of_the_request():
    """b (f l/L - f + 1)^(d/(d-2)): transformers' own angles for a text that arrives at once."""
    stock = _model(rope_parameters={"rope_type": "dynamic", "factor": FACTOR, "rope_theta": 10_000.0})
    model = _model(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    ap.patch_rope_scaling(model, kind="dynamic", factor=FACTOR, per_request=True)
    torch.testing.assert_close(model(TOKENS).logits, stock(TOKENS).logits, rtol=0, atol=2e-5)


def test_dynamic_yarn_is_yarn_per_request():
    assert ap.RopeScaling(kind="dynamic_yarn", factor=2.0).per_request
    wanted = _patched("yarn")(TOKENS).logits
    assert torch.equal(_patched("dynamic_yarn")(TOKENS).logits, wanted)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi", "phi3", "cohere2", "qwen3", "gpt_neox"])
def test_rows_of_a_batch_are_what_they_are_alone(model_type):
    model, lengths = _patched(model_type=model_type), (60, 20, 45)
    found = model(**_batch(lengths)).logits
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, -length:] for name, value in _batch(lengths).items()}
        torch.testing.assert_close(found[row, -length:], model(**alone).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "gpt_neox"])
def test_cached_decoding_is_the_full_forward_of_the_same_request(model_type):
    model, end = _patched(model_type=model_type), 60
    batch, prompt = _batch([60, 25, 44]), 30
    wanted, cache, found = model(**batch).logits, None, []
    with ap.request(model, [60, 25, 44]):
        for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, end))]:
            step = {"input_ids": batch["input_ids"][:, start:stop], "attention_mask": batch["attention_mask"][:, :stop]}
            step["position_ids"] = batch["position_ids"][:, start:stop]
            output = model(**step, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            found.append(output.logits)
    found, real = torch.cat(found, 1), batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_generate_takes_prompt_and_new_tokens_of_each_row(kind, how):
    model, new = _patched(kind), 15
    lengths = (40, 10, 24)
    inputs = {name: value for name, value in _batch(lengths).items() if name != "position_ids"}
    asked = {**GREEDY, **how, "max_new_tokens": new}
    cached = model.generate(**inputs, **asked)
    assert torch.equal(cached, model.generate(**inputs, **asked, use_cache=False))
    each = how.get("num_return_sequences", 1)
    for row, length in enumerate(lengths):
        alone = _model() if length + new <= WINDOW else _patched(kind)
        ids = inputs["input_ids"][row : row + 1, -length:]
        found = cached[row * each : (row + 1) * each, -(length + new) :]
        assert torch.equal(found, alone.generate(ids, **asked))


def test_generate_scores_are_those_of_the_full_forward():
    model, new = _patched(), 20
    output = model.generate(
        TOKENS[:1, :25], **GREEDY, max_new_tokens=new, output_scores=True, return_dict_in_generate=True
    )
    full = model(output.sequences).logits[0, 24:-1]
    torch.testing.assert_close(torch.cat(output.scores), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", [{"cache_implementation": "static"}, {"prefill_chunk_size": 7}, {"max_length": 60}])
def test_other_ways_to_generate_give_the_same_tokens(more):
    model = _patched()
    wanted = model.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=20)
    asked = more if "max_length" in more else {**more, "max_new_tokens": 20}
    assert torch.equal(model.generate(TOKENS[:, :40], **GREEDY, **asked), wanted)


def test_embeddings_in_the_place_of_tokens():
    model = _patched()
    wanted = model.generate(TOKENS[:1, :40], **GREEDY, max_new_tokens=10)[:, 40:]
    embeds = model.get_input_embeddings()(TOKENS[:1, :40])
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=10), wanted)


def test_nothing_leaks_from_one_request_to_the_next():
    model = _patched()
    short = model(TOKENS[:, :20]).logits
    long = model(TOKENS).logits
    model.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=30)
    with contextlib.suppress(IndexError), ap.request(model, 70):
        model(TOKENS[:, :20] + 1000)  # no such token
    assert torch.equal(model(TOKENS[:, :20]).logits, short)
    assert torch.equal(model(TOKENS).logits, long)


def test_modules_of_old_lengths_are_let_go():
    model = _patched()
    hook = next(hook for hook in model.model.rotary_emb._forward_hooks.values() if isinstance(hook, RequestAngles))
    first = model(TOKENS[:1, : WINDOW + 1]).logits
    for length in range(WINDOW + 1, WINDOW + 41):
        model(TOKENS[:1, :length])
    assert [length for length, _ in hook.modules] == [*range(WINDOW + 9, WINDOW + 41)]  # the last 32
    assert torch.equal(model(TOKENS[:1, : WINDOW + 1]).logits, first)  # made anew
    newest = hook.modules[(WINDOW + 40, "cpu")]
    model(TOKENS[:1, : WINDOW + 40])
    assert hook.modules[(WINDOW + 40, "cpu")] is newest


def test_two_threads_keep_their_own_lengths():
    model, found = _patched(), {}
    wanted = {n: model.generate(TOKENS[:1, :n], **GREEDY, max_new_tokens=12) for n in (20, 34, 60)}

    def run(length):
        found[length] = [model.generate(TOKENS[:1, :length], **GREEDY, max_new_tokens=12) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(n,)) for n in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, wanted[n]) for n in wanted for each in found[n])


# -- what would change angles under way is an error -------------------------------------------------------------------


def _begun(model, length=WINDOW + 8, cache=None):
    return model(TOKENS[:, :length], **{CACHE: cache}, use_cache=True)[CACHE]


@pytest.mark.parametrize("make", [lambda model: None, lambda model: DynamicCache(config=model.config)])
def test_going_on_beyond_the_length_that_was_chosen_is_an_error(make):
    model = _patched()
    cache = _begun(model, cache=make(model))
    with pytest.raises(ap.AttnPatchError, match=r"row 0 is 41 tokens long, .* 40 were chosen.*hf_attnpatch.request"):
        model(TOKENS[:, 40:41], **{CACHE: cache})
    copied = copy.deepcopy(_begun(model))  # a prefix that is used more than once
    with pytest.raises(ap.AttnPatchError, match="40 were chosen"):
        model(TOKENS[:, 40:42], **{CACHE: copied})


def test_within_the_window_a_text_may_grow_as_it_likes():
    model, base = _patched(), _model()
    cache, other = _begun(model, 10), _begun(base, 10)
    for n in range(10, WINDOW):
        found = model(TOKENS[:, n : n + 1], **{CACHE: cache}).logits
        assert torch.equal(found, base(TOKENS[:, n : n + 1], **{CACHE: other}).logits)
    with pytest.raises(ap.AttnPatchError, match="row 0 is 33 tokens long"):
        model(TOKENS[:, :1], **{CACHE: cache})


def test_a_cache_of_several_turns():
    model = _patched()
    cache = DynamicCache(config=model.config)
    first = model.generate(TOKENS[:1, :10], **GREEDY, max_new_tokens=10, **{CACHE: cache})
    second = torch.cat([first, TOKENS[:1, :6]], 1)
    third = model.generate(second, **GREEDY, max_new_tokens=4, **{CACHE: cache})  # 30 tokens, within the window
    assert torch.equal(third, model.generate(second, **GREEDY, max_new_tokens=4))
    with pytest.raises(ap.AttnPatchError, match=r"begun for requests of 20 tokens, and now 50 are asked for"):
        model.generate(third, **GREEDY, max_new_tokens=20, **{CACHE: cache})


def test_a_conversation_that_is_announced():
    model = _patched()
    cache = DynamicCache(config=model.config)
    with ap.request(model, 70):
        first = model.generate(TOKENS[:1, :40], **GREEDY, max_new_tokens=10, **{CACHE: cache})
        turn = torch.cat([first, TOKENS[:1, :5]], 1)
        second = model.generate(turn, **GREEDY, max_new_tokens=10, **{CACHE: cache})
        assert torch.equal(second, model.generate(turn, **GREEDY, max_new_tokens=10))
        with pytest.raises(ap.AttnPatchError, match="generate leads to 85 tokens, .* said to have 70"):
            model.generate(second, **GREEDY, max_new_tokens=20, **{CACHE: cache})
    assert not torch.equal(model.generate(turn, **GREEDY, max_new_tokens=10, output_scores=True), second[:, :1])


def test_a_cache_from_before_the_patch():
    model = _model()
    cache = _begun(model, 20)
    ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR, per_request=True)
    model(TOKENS[:, 20:30], **{CACHE: cache})  # within the window nothing has changed
    with pytest.raises(ap.AttnPatchError, match="30 were chosen"):
        model(TOKENS[:, 30:40], **{CACHE: cache})
    other = _begun(_model(), 40)
    with pytest.raises(ap.AttnPatchError, match="filled before the scaling was there"):
        model(TOKENS[:, 40:41], **{CACHE: other})


def test_a_static_cache_that_is_used_again_begins_anew():
    model = _patched()
    cache = StaticCache(config=model.config, max_cache_len=80)
    for length in (40, 60):
        cache.reset()
        found = model(TOKENS[:, :length], **{CACHE: cache}).logits
        torch.testing.assert_close(found, model(TOKENS[:, :length]).logits, rtol=0, atol=1e-5)


def test_requests_packed_into_one_row_are_refused():
    with pytest.raises(ap.AttnPatchError, match="packed into one row"):
        _patched()(TOKENS[:1], cu_seq_lens_q=torch.tensor([0, 40, 80], dtype=torch.int32))


@pytest.mark.parametrize("length", [0, -3, "70", 3.5, True, [], [10, None]])
def test_lengths_that_will_not_do(length):
    with pytest.raises(ap.AttnPatchError, match="it must be a number of tokens"), ap.request(_patched(), length):
        pass


def test_what_request_and_the_rotary_module_are_for():
    with pytest.raises(ap.AttnPatchError, match="patch it with per_request=True"), ap.request(_model(), 70):
        pass
    model = _patched()
    with pytest.raises(ap.AttnPatchError, match="3 rows in a batch, but lengths of 2"), ap.request(model, [50, 60]):
        model(TOKENS)
    with pytest.raises(ap.AttnPatchError, match="outside its model"):
        model.model.rotary_emb(torch.zeros(1, 3, 64), position_ids=torch.arange(3)[None])
    with pytest.raises(ap.AttnPatchError, match=r"call model.generate"):
        type(model).generate(model, TOKENS[:1, :40], **GREEDY, max_new_tokens=3)


# -- the patched model is an ordinary model ---------------------------------------------------------------------------


def test_revert_is_bitwise_and_takes_generate_away():
    model = _model()
    before = snapshot(model)
    report = ap.patch_rope_scaling(model, kind="yarn", factor=FACTOR, per_request=True)
    assert "generate" in vars(model)
    model.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=5)
    report.revert()
    assert snapshot(model) == before
    assert "generate" not in vars(model)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_generates_with_its_own_weights(copier):
    model = _patched()
    wanted = model.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=10)
    twin = copier(model)
    assert torch.equal(twin.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=10), wanted)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=10), wanted)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "clipped"])
def test_a_checkpoint_comes_back_as_it_was(kind, tmp_path):
    model = _patched(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == FACTOR * WINDOW
    for length in (20, 60):
        assert torch.equal(loaded(TOKENS[:, :length]).logits, model(TOKENS[:, :length]).logits)
    wanted = model.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=10)
    assert torch.equal(loaded.generate(TOKENS[:, :40], **GREEDY, max_new_tokens=10), wanted)


def test_training_reaches_the_weights_and_checkpointing_changes_nothing():
    model = _patched().requires_grad_(True).train()
    gradients = []
    for on in (False, True):
        _checkpoint(model, on)
        model.zero_grad()
        model(**_batch([60, 25]), labels=TOKENS[:2, :60]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().sum() > 0 for g in gradients[0])


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_it_is_the_same():
    model = _patched()
    compiled = torch.compile(model, backend="eager")
    for lengths in ([60, 20], [60, 45], [30, 20], [50, 50]):
        torch.testing.assert_close(
            compiled(**_batch(lengths)).logits, model(**_batch(lengths)).logits, rtol=0, atol=1e-5
        )


def test_a_model_that_was_scaled_before_is_scaled_on_top():
    model, twin = _model(), _model()
    for each in (model, twin):
        ap.patch_rope_scaling(each, kind="llama3", factor=2.0)
    within = model(TOKENS[:, : 2 * WINDOW]).logits
    ap.patch_rope_scaling(model, kind="yarn", factor=2.0, per_request=True)
    assert torch.equal(model(TOKENS[:, : 2 * WINDOW]).logits, within)
    ap.patch_rope_scaling(twin, kind="yarn", factor=80 / 64)
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)
    with pytest.raises(ap.UnsupportedArchitecture, match="chosen per request already"):
        ap.patch_rope_scaling(model, kind="yarn", factor=2.0)


def test_a_trained_window_that_the_config_does_not_tell():
    model, base = _patched(trained_length=20), _model()
    assert torch.equal(model(TOKENS[:, :20]).logits, base(TOKENS[:, :20]).logits)
    assert not torch.equal(model(TOKENS[:, :30]).logits, base(TOKENS[:, :30]).logits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "yarn", "trained_length": 20}, "trained_length belongs to per_request"),
        ({"kind": "yarn", "per_request": True, "trained_length": 0}, "trained_length is 0"),
        ({"kind": "yarn", "per_request": 1}, "per_request is 1; it must be True or False"),
    ],
)
def test_fields_that_will_not_do(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.RopeScaling(factor=2.0, **fields)


# -- faults of transformers: each fails on stock and passes patched ---------------------------------------------------


def _stock(kind):
    """Transformers' own model of a kind that goes by the length of a forward, and this package's of the same config."""
    rope = {"rope_type": kind, "factor": FACTOR, "rope_theta": 10_000.0}
    if kind == "longrope":
        long = [1.0 + i / 2 for i in range(8)]
        rope |= {"short_factor": [1.0] * 8, "long_factor": long, "original_max_position_embeddings": WINDOW}
    window = WINDOW if kind == "dynamic" else int(WINDOW * FACTOR)
    stock, patched = (
        tiny_model("llama", max_position_embeddings=window, rope_parameters=dict(rope)).requires_grad_(False)
        for _ in range(2)
    )
    ap.patch_rope_scaling(patched, kind=kind, factor=1.0, per_request=True)
    return stock, patched


@contextlib.contextmanager
def _announced(model, length):
    with ap.request(model, length) if "generate" in vars(model) else contextlib.nullcontext():
        yield


def _cached(model, prompt=20, end=60):
    with _announced(model, end):
        output = model(TOKENS[:, :prompt], use_cache=True)
        found = [output.logits]
        for n in range(prompt, end):
            output = model(TOKENS[:, n : n + 1], **{CACHE: output[CACHE]})
            found.append(output.logits)
    return torch.cat(found, 1)


def _far(found, wanted):
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_that_switches_by_length_is_taken_over(kind, tmp_path):
    stock, patched = _stock(kind)
    for length in (WINDOW, 60):
        assert _far(patched(TOKENS[:, :length]).logits, stock(TOKENS[:, :length]).logits) < 2e-5
    patched.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for length in (WINDOW, 60):
        assert torch.equal(loaded(TOKENS[:, :length]).logits, patched(TOKENS[:, :length]).logits)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_cached_decoding_differs_upstream(kind):
    stock, patched = _stock(kind)
    assert _far(_cached(stock), stock(TOKENS[:, :60]).logits) > 0.1
    assert _far(_cached(patched), patched(TOKENS[:, :60]).logits) < 1e-5


def test_state_leaks_between_requests_upstream():
    stock, patched = _stock("dynamic")
    found = []
    for model in (stock, patched):
        first = model(TOKENS[:, :50]).logits
        model(TOKENS[:, :80])
        found.append(_far(model(TOKENS[:, :50]).logits, first))
    assert found[0] > 0.1
    assert found[1] == 0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_long_row_changes_a_short_one_upstream(kind):
    found = []
    for model in _stock(kind):
        batch = _batch([60, 20])
        alone = {name: value[1:, -20:] for name, value in batch.items()}
        found.append(_far(model(**batch).logits[1, -20:], model(**alone).logits[0]))
    assert found[0] > 0.1
    assert found[1] < 1e-5


def test_dynamic_ignores_the_original_window_upstream():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": WINDOW}
    stock, patched = (tiny_model("llama", max_position_embeddings=128, rope_parameters=dict(rope)) for _ in range(2))
    plain = _model(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    ap.patch_rope_scaling(patched, kind="dynamic", factor=1.0, per_request=True)
    assert torch.equal(stock(TOKENS).logits, plain(TOKENS).logits)  # the fault: 80 tokens, and nothing is scaled
    ap.patch_rope_scaling(plain, kind="ntk", factor=2 * 80 / WINDOW - 1)
    torch.testing.assert_close(patched(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("present", "kind", "factor"), [("longrope", "yarn", 2.0), ("longrope", "longrope", 2.0), ("dynamic", "yarn", 2.0)]
)
def test_only_its_own_kind_takes_a_switching_model_over(present, kind, factor):
    stock, _ = _stock(present)
    before = snapshot(stock)
    with pytest.raises(ap.AttnPatchError, match="switches by length itself"):
        ap.patch_rope_scaling(stock, kind=kind, factor=factor, per_request=True)
    assert snapshot(stock) == before


@pytest.mark.parametrize("drafts", ["prompt", "itself", "unpatched", "patched for unpatched"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_speculation_writes_what_greedy_decoding_writes(kind, drafts):
    """Candidates may reach beyond the end, and a draft model is called for a few tokens at a time."""
    model, plain = _patched(kind), _model()
    asked, helper = (plain, model) if drafts == "patched for unpatched" else (model, plain)
    helper = copy.deepcopy(model) if drafts == "itself" else helper
    given = {"prompt_lookup_num_tokens": 3} if drafts == "prompt" else {"assistant_model": helper}
    prompt = TOKENS[:1, :40].repeat(1, 1)
    prompt[0, 20:40] = prompt[0, :20]  # something to look up
    options = {**GREEDY, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 25}
    wanted = asked.generate(prompt, **options)
    assert torch.equal(asked.generate(prompt, **options, **given), wanted)
    assert torch.equal(asked.generate(prompt, **options), wanted)  # nothing is left behind


@pytest.mark.parametrize("move", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("rows", [[1, 0], [0, 1, 0, 1], [1, 1], [1]])
@pytest.mark.parametrize("made", ["", "copied", "pickled"])
def test_lengths_go_where_the_rows_of_a_cache_go(move, rows, made):
    model, lengths = _patched(), [60, 80]
    with ap.request(model, lengths):
        past = model(TOKENS[:2, :40], use_cache=True)[CACHE]
        wanted = model(TOKENS[:2, 40:42], **{CACHE: copy.deepcopy(past)}).logits[rows]
    past = {"copied": copy.deepcopy, "pickled": lambda p: pickle.loads(pickle.dumps(p)), "": lambda p: p}[made](past)
    getattr(past, move)(torch.tensor(rows))
    with ap.request(model, [lengths[row] for row in rows]):
        found = model(TOKENS[rows, 40:42], **{CACHE: past}).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
