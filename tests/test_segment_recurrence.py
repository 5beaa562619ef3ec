"""SegmentRecurrence on models: against masks written out, against recomputation, in streams, caches and checkpoints."""

import contextlib
import copy

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from recurring import (
    DEPTH,
    NATIVE,
    L,
    M,
    built,
    logits_of,
    masked,
    random_ids,
    under_the_mask,
    with_memory,
)
from tolerances import EXACT, ROUNDING
from transformers import AutoModelForCausalLM, DynamicCache

import hf_attnpatch as ap
from hf_attnpatch.functional.segments import NOBODY, Segments, pieces
from hf_attnpatch.probe import largest_difference
from hf_attnpatch.recurrence import call as recurrence_call
from hf_attnpatch.recurrence import memory as recurrence_memory
from hf_attnpatch.recurrence.forms import keys_alone
from hf_attnpatch.recurrence.sinks import Sinks
from recipes.loop import recompute

FP32 = ROUNDING[torch.float32]
ROPE = ["llama", "gpt_neox", "glm", "phi", "cohere"]  # halves, part of a head, neighbours
KINDS = [
    *((t, p) for t in ROPE for p in ("bounded", "running")),
    ("gpt2", "bounded"),
    ("gpt2", "running"),
    ("opt", "bounded"),
    ("bert", "bounded"),
    *((t, p) for t in ("bloom", "mpt", "gptj") for p in ("bounded", "running")),
    *((t, "bounded") for t in ("codegen", "falcon", "gpt_neox_japanese")),
]


@pytest.mark.parametrize(("length", "memory"), [(1, 0), (1, 3), (4, 0), (4, 3), (4, 4), (4, 9), (7, 5), (40, 8)])
def test_the_mask_is_what_a_loop_says(length, memory):
    found = Segments(length, memory).mask(30)
    for i in range(30):
        begin = i // length * length
        for j in range(30):
            assert bool(found[i, j]) == (max(0, begin - memory) <= j <= i), (i, j)


@pytest.mark.parametrize("phase", [0, 3, 7, None])
@pytest.mark.parametrize(("held", "tokens"), [(0, 1), (0, 30), (5, 8), (19, 30), (12, 1)])
def test_pieces_cover_a_call_and_reach_back_far_enough(phase, held, tokens):
    found = pieces(Segments(L, M), held, tokens, phase)
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])]
    assert found[-1].stop == tokens
    for piece in found:
        assert 0 < piece.stop - piece.start <= L
        for column in range(piece.start, piece.stop):
            inside = L - 1 if phase is None else (phase + column) % L
            assert piece.low <= max(0, held + column - inside - M)


def _attended(model, run):
    """What the one attention module gave, in fp64, rounded to fp32."""
    found = []
    path = ap.describe(model).sites[0].path
    hook = model.get_submodule(path).register_forward_hook(lambda _, args, out: found.append(out[0].float()))
    run()
    hook.remove()
    return found[0]


@pytest.mark.parametrize(
    ("model_type", "alibi", "positions"),
    [
        *(("llama", False, "running"), ("llama", True, "bounded"), ("llama", True, "running")),
        *(("gpt2", False, "bounded"), ("gpt2", False, "running")),
        ("falcon", False, "running"),  # BLOOM and MPT round slope times position, GPT-J computes scores in fp32
    ],
)
def test_one_layer_equals_the_dense_mask_exactly(model_type, alibi, positions):
    """Not a bit differs over 20 segments; rotary angles are in fp32, so that turning them back is not among these."""
    model, ids = built(model_type, alibi, **{DEPTH.get(model_type, "n_layer"): 1}).double(), random_ids(2, 20 * L)
    patched = with_memory(model, positions)
    wanted = _attended(model, lambda: under_the_mask(model, ids, positions))
    assert wanted.abs().max() > 0.1
    assert (_attended(patched, lambda: logits_of(patched, ids)) - wanted).abs().max() == EXACT


@pytest.mark.parametrize(("model_type", "positions"), KINDS)
def test_calls_of_any_length_equal_the_dense_mask(model_type, positions):
    model, ids = built(model_type), random_ids(2, 50)
    wanted, model = under_the_mask(model, ids, positions), with_memory(model, positions)
    assert largest_difference(wanted, logits_of(model, ids)) < FP32
    with ap.stream(model) as stream:
        parts = [logits_of(model, ids[:, a:b]) for a, b in [(0, 5), (5, 6), (6, 25), (25, 25 + 2 * L), (41, 50)]]
        assert stream.tokens == [50, 50]
    assert largest_difference(wanted, torch.cat(parts, 1)) < FP32
    assert largest_difference(wanted, logits_of(model, ids)) < FP32  # nothing of the stream is left


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("alibi", [False, True, "xl"])
def test_grouped_heads(kv, alibi):
    model, ids = built("llama", alibi, num_key_value_heads=kv), random_ids(2, 45)
    assert largest_difference(under_the_mask(model, ids), logits_of(with_memory(model), ids)) < FP32


def test_a_model_without_positions():
    model = built("llama")
    ap.patch_alibi(model, strength=0.0)
    ids = random_ids(2, 45)
    assert largest_difference(under_the_mask(model, ids), logits_of(with_memory(model), ids)) < FP32


def _recomputed(model, ids, positions):
    """Sum of squared logits, segment by segment, through transformers' own cache, its keys detached; with gradients."""
    total, kept = 0.0, []
    for start in range(0, ids.shape[1], L):
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(kept):
            cache.update(keys[:, :, -M:].detach(), values[:, :, -M:].detach(), layer)
        held = cache.get_seq_length()
        mask = torch.ones(L, held + L, dtype=torch.bool).tril(held)[None, None].expand(len(ids), 1, -1, -1)
        places = torch.arange(start, start + L)[None]
        if ap.describe(model).tables and positions == "bounded":
            places = places % L
        native = model.config.model_type in NATIVE
        given = {"attention_mask": None if native else mask, "position_ids": places}
        given = {} if model.config.model_type in ("bloom", "mpt") else given
        with masked(model, mask) if native else contextlib.nullcontext():
            out = model(input_ids=ids[:, start : start + L], **{CACHE: cache}, **given)
        total = total + out.logits.square().sum()
        kept = [(layer.keys, layer.values) for layer in out[CACHE].layers]
    return total


@pytest.mark.parametrize(
    ("model_type", "alibi", "positions"),
    [
        *(("llama", False, "bounded"), ("llama", False, "running"), ("llama", True, "bounded")),
        *(("llama", "xl", "bounded"), ("gpt2", "xl", "bounded")),
        *(("gpt2", False, "bounded"), ("gpt2", False, "running")),
        *(("bloom", False, "bounded"), ("mpt", False, "bounded"), ("gptj", False, "bounded")),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_deep_model_equals_recomputation_with_stop_gradient(model_type, alibi, positions, streamed):
    model, ids = built(model_type, alibi, **{DEPTH.get(model_type, "n_layer"): 4}), random_ids(2, 20 * L)
    patched = with_memory(model, positions)
    wanted = _recomputed(model, ids, positions)
    wanted.backward()
    if streamed:
        with ap.stream(patched):
            found = sum(patched(input_ids=part).logits.square().sum() for part in ids.split(2 * L, 1))
    else:
        found = patched(input_ids=ids, use_cache=False).logits.square().sum()
    found.backward()
    assert abs(float(found.detach() / wanted.detach()) - 1) < FP32
    for (name, one), two in zip(model.named_parameters(), patched.parameters(), strict=True):
        if one.grad is not None:
            assert largest_difference(one.grad, two.grad) < FP32, name


def test_gradients_of_rows_that_stand_differently():
    """Left-padded rows: their segments end at other columns, and so do their gradients."""
    model, patched = built("llama"), with_memory(built("llama"))
    ids, pads = random_ids(3, 30), (0, 3, 7)
    wide = torch.stack([torch.cat([torch.full((p,), 7), row[: 30 - p]]) for p, row in zip(pads, ids, strict=True)])
    mask = torch.stack([torch.arange(30) >= p for p in pads]).long()
    logits = patched(input_ids=wide, attention_mask=mask, use_cache=False).logits
    (logits.square().sum(-1) * mask).sum().backward()
    alone = copy.deepcopy(patched)
    alone.zero_grad()
    sum(alone(input_ids=row[None, : 30 - p]).logits.square().sum() for p, row in zip(pads, ids, strict=True)).backward()
    for (name, one), two in zip(patched.named_parameters(), alone.parameters(), strict=True):
        assert largest_difference(two.grad, one.grad) < FP32, name
    del model


@pytest.mark.parametrize("positions", ["bounded", "running"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "alibi", "xl", "bloom", "gptj"])
def test_rows_of_different_length_equal_the_same_documents_alone(positions, kernel):
    model_type = kernel if kernel in NATIVE else "llama"
    model = built(model_type, {"alibi": True, "xl": "xl"}.get(kernel, False))
    if kernel == "eager":
        model.set_attn_implementation("eager")
    model = with_memory(model, positions)
    documents = [random_ids(1, n, seed=n)[0] for n in (37, 8, 20, 51, 16, 3)]
    queues = [[documents[0], documents[1]], [documents[2], documents[3]], [documents[4], documents[5]]]
    found = [[], [], []]
    with ap.stream(model) as stream:
        while any(queues):
            columns = [queue[0][:L] if queue else torch.empty(0, dtype=torch.int64) for queue in queues]
            keep = torch.stack([torch.arange(L) < len(c) for c in columns])
            padded = torch.stack([torch.cat([c, torch.full((L - len(c),), 7)]) for c in columns])
            logits = logits_of(model, padded, attention_mask=keep.long())
            ended = []
            for row, queue in enumerate(queues):
                if queue:
                    found[row].append(logits[row, : len(columns[row])])
                    queue[0] = queue[0][L:]
                    if not len(queue[0]):
                        queue.pop(0)
                        ended.append(row)
            stream.reset(ended)
    alone = [[documents[0], documents[1]], [documents[2], documents[3]], [documents[4], documents[5]]]
    for row, pair in enumerate(alone):
        wanted = torch.cat([logits_of(model, document[None])[0] for document in pair])
        assert largest_difference(wanted, torch.cat(found[row])) < FP32


@pytest.mark.parametrize(
    ("model_type", "kernel"),
    [("llama", "sdpa"), ("llama", "eager"), ("llama", "flex_attention"), ("gpt2", "sdpa"), ("gpt2", "eager")],
)
@torch.no_grad()
def test_decoding_left_padded_rows_through_every_kernel(model_type, kernel):
    model, ids = built(model_type), random_ids(2, 40)
    wanted = under_the_mask(model, ids)
    model.set_attn_implementation(kernel)
    model = with_memory(model)
    wide = torch.cat([torch.full((2, 5), 7), ids], 1)
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[:, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, parts = None, []
    for a, b in [(0, 3), (3, 20), *((i, i + 1) for i in range(20, 45))]:
        out = model(
            input_ids=wide[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=places[:, a:b],
            **{CACHE: cache},
            use_cache=True,
        )
        cache = out[CACHE]
        parts.append(out.logits.detach())
    assert largest_difference(wanted, torch.cat(parts, 1)[:, 5:]) < FP32


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_kernels_agree(kernel):
    model, ids = built("llama", num_key_value_heads=2), random_ids(2, 43)
    wanted = logits_of(with_memory(model), ids)
    model.set_attn_implementation(kernel)
    assert largest_difference(wanted, logits_of(with_memory(model), ids)) < FP32


def test_flash_attention_is_told_which_keys_there_are():
    """No GPU: the mask for it, against the one that is written out, as the library would align the two."""
    tokens = torch.tensor([[5, 6, 7, NOBODY], [8, 9, 10, 11]])
    memory = recurrence_memory.Memory()
    memory.begin(2)
    held = torch.tensor([[NOBODY, NOBODY, *range(5)], [*range(1, 8)]])
    read = torch.ones(2, 8, dtype=torch.bool)
    memory.put({}, Sinks(), held, held, torch.tensor([5, 8]), torch.zeros(2, dtype=torch.int64), read)
    call = recurrence_call.Call(
        Segments(16, 8), recurrence_call.Tokens(tokens != NOBODY, tokens, tokens), memory, layers=1
    )
    seen = torch.ones(2, 4, 11, dtype=torch.bool).tril(7)
    seen[0, :, :2] = False
    seen[0, :, 10] = False
    found = keys_alone(seen, call.tokens.keep)
    assert found.tolist() == [[False] * 2 + [True] * 8 + [False], [True] * 11]
    assert keys_alone(torch.ones(2, 4, 11, dtype=torch.bool).tril(7), torch.ones(2, 4).bool()) is None
    seen[0, 2, 3] = False
    with pytest.raises(ap.AttnPatchError, match="which keys are present"):
        keys_alone(seen, call.tokens.keep)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mpt", "gptj"])
def test_generate_goes_beyond_any_length_with_constant_memory(model_type):
    model = with_memory(built(model_type))
    prompt = random_ids(1, 11)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=600, do_sample=False, use_cache=True,
        eos_token_id=None, return_dict_in_generate=True,
    )  # fmt: skip
    cache = out[CACHE]
    assert cache.get_seq_length() == out.sequences.shape[1] - 1 == 610
    assert max(layer.keys.shape[2] for layer in cache.layers) < L + M
    wanted = logits_of(model, out.sequences[:, :-1])[:, 10:].argmax(-1)
    assert torch.equal(wanted, out.sequences[:, 11:])


def test_beams_take_their_memory_along():
    model = with_memory(built("llama"))
    prompt = random_ids(1, 20)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    cached, plain = (model.generate(prompt, attention_mask=mask, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("model_type", "alibi"), [("llama", False), ("llama", True), ("llama", "xl"), ("bloom", False), ("gptj", False)]
)
def test_gradient_checkpointing_meets_the_same_memory(model_type, alibi):
    found = []
    for checkpointing in (False, True):
        model = with_memory(built(model_type, alibi))
        model.train()
        if checkpointing:
            recompute(model)
        with ap.stream(model) as stream:
            losses = [model(input_ids=part).logits.square().mean() for part in random_ids(2, 6 * L).split(3 * L, 1)]
            sum(losses).backward()
            memory = stream.state_dict()
        found.append((losses, [p.grad for p in model.parameters() if p.grad is not None], memory))
    for one, two in zip(found[0][:2], found[1][:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(t, found[1][2][name]) for name, t in found[0][2].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", *sorted(NATIVE)])
def test_no_memory_and_one_segment_is_the_same_bits(model_type, dtype):
    model = built(model_type).to(dtype)
    inputs = {**tiny_inputs(model)}
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    patched = with_memory(model, length=64, memory=0)
    for extra in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            wanted, found = (m(**inputs, **extra, use_cache=False).logits for m in (model, patched))
        real = mask.bool() if model_type == "falcon" and extra else slice(None)  # what padding gives is the kernel's
        assert torch.equal(wanted[real], found[real])


def test_a_stream_can_be_saved_and_gone_on_with():
    model, ids = with_memory(built("llama")), random_ids(2, 50)
    with ap.stream(model) as stream:
        logits_of(model, ids[:, :21])
        state = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
        wanted = logits_of(model, ids[:, 21:])
    with ap.stream(copy.deepcopy(model)) as stream:
        stream.load_state_dict(state)
    other = copy.deepcopy(model)
    with (stream := ap.stream(other)):
        stream.load_state_dict(state)
        assert torch.equal(wanted, logits_of(other, ids[:, 21:]))
        with pytest.raises(ap.AttnPatchError, match="a stream of 2 rows"):
            logits_of(other, ids[:1])
        with pytest.raises(ap.AttnPatchError, match="rows \\[4\\] cannot be reset"):
            stream.reset([4])
        stream.reset()
        assert largest_difference(logits_of(model, ids[:1]), logits_of(other, ids[:1])) < FP32


def test_what_fails_on_the_way_leaves_the_memory_as_it_was():
    model, ids = with_memory(built("llama")), random_ids(1, 30)
    with ap.stream(model) as stream:
        logits_of(model, ids[:, :12])
        before = stream.state_dict()
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits_of(model, ids[:, 12:])
        hook.remove()
        assert all(torch.equal(t, before[name]) for name, t in stream.state_dict().items())
        found = logits_of(model, ids[:, 12:])
    assert largest_difference(logits_of(model, ids)[:, 12:], found) < FP32


@pytest.mark.parametrize(
    ("model_type", "alibi"),
    [("llama", False), ("llama", True), ("llama", "xl"), ("bloom", False), ("bloom", True), ("gptj", False)],
)
def test_checkpoints_come_back_with_their_memory(model_type, alibi, tmp_path):
    model, ids = with_memory(built(model_type, alibi)), random_ids(2, 40)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(model, ids), logits_of(again, ids))


@pytest.mark.parametrize(
    ("model_type", "alibi"),
    [
        ("llama", False),
        ("llama", True),
        ("llama", "xl"),
        ("gpt2", False),
        ("bloom", False),
        ("bloom", "xl"),
        ("mpt", True),
    ],
)
def test_invariants(model_type, alibi):
    found = ap.verify(with_memory(built(model_type, alibi)))
    assert found.passed, str(found)


def test_revert_is_bitwise():
    model, ids = built("llama"), random_ids(1, 30)
    wanted, before = logits_of(model, ids), dict(model.named_modules())
    report = ap.patch_segment_recurrence(model, segment_length=L, memory_length=M)
    assert "segments of 8 tokens, each with 12 before it" in " ".join(str(report).split())
    report.revert()
    assert torch.equal(wanted, logits_of(model, ids))
    assert all(module is before[name] for name, module in model.named_modules())
    assert not model.model._forward_pre_hooks
    with pytest.raises(ap.AttnPatchError, match="patch_segment_recurrence first"):
        ap.stream(model)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("llama4_text", "a chunk only"),
        ("cpmant", "no memory can be handed to it"),
        ("gpt_neo", "sees a window only"),
        ("roformer", "takes no positions"),
        ("roberta", "uses positions or masks in its own way"),
        ("mamba", "keeps a state, not keys and values"),
        ("bart", "segment memory holds one text"),
    ],
)
def test_models_without_a_place_for_a_memory_are_refused(model_type, words):
    model = tiny_model(model_type)
    with pytest.raises(ap.UnsupportedArchitecture, match=words):
        ap.patch_segment_recurrence(model, segment_length=L, memory_length=M)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"segment_length": 0, "memory_length": 1}, "segment_length is 0"),
        ({"segment_length": 8, "memory_length": -1}, "memory_length is -1"),
        ({"segment_length": True, "memory_length": 1}, "segment_length is True"),
        ({"segment_length": 8, "memory_length": 1, "positions": "x"}, "choose from bounded, running"),
    ],
)
def test_arguments_out_of_range(fields, words):
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.SegmentRecurrence(**fields)


def test_inputs_that_a_memory_cannot_take_are_errors():
    model, ids = with_memory(built("llama")), random_ids(2, 30)
    cache = DynamicCache()
    with pytest.raises(ap.AttnPatchError, match="makes its own cache"):
        logits_of(model, ids, **{CACHE: _filled(cache)})
    with pytest.raises(ap.AttnPatchError, match="takes \\(batch, tokens\\) only"):
        logits_of(model, ids, attention_mask=torch.ones(2, 1, 30, 30, dtype=torch.bool))
    with pytest.raises(ap.AttnPatchError, match="packed documents"):
        logits_of(model, ids, position_ids=torch.tensor([[*range(20), *range(10)]]))
    gap = torch.ones(2, 30, dtype=torch.long)
    gap[1, 4:6] = 0
    with pytest.raises(ap.AttnPatchError, match="row 1: padding between tokens"):
        logits_of(model, ids, attention_mask=gap)
    wanted = logits_of(model, ids)
    model.set_attn_implementation("eager")  # beneath it
    assert largest_difference(logits_of(model, ids), wanted) < FP32
    table = with_memory(built("gpt2", n_positions=32), "running")
    with pytest.raises(ap.AttnPatchError, match="the model's table has 32"):
        logits_of(table, random_ids(1, 40))


def _filled(cache):
    cache.update(torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, 16), 0)
    return cache


def test_a_model_that_makes_masks_for_layers_it_has_not():
    """Qwen2-MoE asks for a windowed mask too, last, and uses none of it: a plain call must get the other."""
    model = tiny_model("qwen2_moe", sliding_window=2)
    ids, patched = random_ids(2, 3 * L), with_memory(model)
    assert largest_difference(under_the_mask(model, ids), logits_of(patched, ids)) < FP32
    assert largest_difference(logits_of(model, ids[:, :L]), logits_of(patched, ids[:, :L])) < FP32
