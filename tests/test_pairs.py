"""Two patches on one model, in both orders, in one call and in two: what they give together, or why they cannot be.

The table of all pairs is made by ``python scripts/pairs.py`` from the same rows.
"""

import copy

import pytest
import torch
from architectures import tiny_model
from caches import CACHE
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.attention.wrapper import wrappers_of
from hf_attnpatch.edits import RemoveHook
from hf_attnpatch.spans.attention import span_of

MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=8)
EXTEND = ap.SelfExtend(window=6, group=3, trained=10)
IDS = torch.randint(5, 99, (1, 30), generator=torch.Generator().manual_seed(0))
FP32 = 1e-5


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def patched(model_type, *patches, once=False, kernel=None):
    model = tiny_model(model_type)
    if kernel is not None:
        model.set_attn_implementation(kernel)
    if once:
        ap.apply(model, *patches)
    for patch in () if once else patches:
        ap.apply(model, patch)
    return model


def names(model):
    return {tuple(each.name for each in wrappers_of(m)) for m in model.modules() if wrappers_of(m)}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "patch", [ap.Alibi(), ap.RelativeXl(), EXTEND, ap.ReRope(window=5, trained=10), MEMORY], ids=lambda p: p.name
)
def test_the_kernel_beneath_may_be_changed(patch, kernel):
    """By transformers' own method, which knows nothing of wrappers; oracle: the logits before."""
    model = patched("llama", patch)
    wanted = logits(model)
    model.set_attn_implementation(kernel)
    assert float((logits(model) - wanted).abs().max()) < 10 * FP32
    assert model.config._attn_implementation == f"attnpatch_{kernel}"


@pytest.mark.parametrize("patch", [ap.Alibi(backend="eager"), ap.RelativeXl(backend="eager"), ap.Rotary()])
def test_a_fused_kernel_comes_beneath_what_was_put_around(patch):
    model = patched("gpt2", patch)
    model.set_attn_implementation("eager")
    wanted = logits(model)
    report = ap.patch_flash(model, backend="sdpa")
    assert report.changed
    assert model.config._attn_implementation == "attnpatch_sdpa"
    assert float((logits(model) - wanted).abs().max()) < 10 * FP32
    report.revert()
    assert torch.equal(logits(model), wanted)


def alone(model_type, patch):
    """The model with a memory that reaches over everything, in segments: its patch alone computes the same."""
    return logits(patched(model_type, patch))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("patch", [ap.Alibi(), ap.RelativeXl(), ap.Rotary(theta=500.0)], ids=lambda p: p.name)
@pytest.mark.parametrize("once", [True, False])
def test_a_memory_goes_on_top_of_new_positions(model_type, patch, once):
    """Oracle: a memory of all that went before changes nothing, in however many segments the text is read."""
    if model_type == "bloom" and isinstance(patch, ap.Alibi):
        patch = ap.Alibi(distance_clip=40)
    whole = ap.SegmentRecurrence(segment_length=8, memory_length=64)
    model = patched(model_type, patch, whole, once=once)
    found = logits(model)
    assert float((found - alone(model_type, patch)).abs().max()) < 20 * FP32
    if model_type != "llama" or not isinstance(patch, ap.Rotary):  # there, its own modules are built again
        assert all("memory" in each and len(each) > 1 for each in names(model))
    with ap.stream(model):
        pieces = [logits(model, part) for part in IDS.split([5, 11, 14], 1)]
    assert float((torch.cat(pieces, 1) - found).abs().max()) < 20 * FP32


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
@pytest.mark.parametrize(
    "patch", [ap.Alibi(distance_clip=40), ap.RelativeXl(), ap.Rotary(theta=500.0), MEMORY, EXTEND], ids=lambda p: p.name
)
def test_heads_are_shared_before_or_after(model_type, patch):
    """Oracle: each order gives the other's logits; shared heads know nothing of positions."""
    if model_type == "bloom" and patch is EXTEND:
        pytest.skip("no rotary positions")
    shared = ap.GroupedQuery(num_kv_heads=2, method="mean")
    before, after = patched(model_type, shared, patch), patched(model_type, patch, shared)
    terms = {n: p for n, p in after.named_parameters() if "relative_xl" in n}
    assert float((logits(before) - logits(after)).abs().max()) < 10 * FP32 or terms
    together = patched(model_type, shared, patch, once=True)
    assert torch.equal(logits(together), logits(before))


BENEATH = {  # what comes beneath a memory or a remapping that is there already, by model type
    ap.Alibi(distance_clip=40): ("llama", "gpt2", "bloom"),
    ap.RelativeXl(): ("llama",),
    ap.Rotary(theta=500.0): ("llama", "gpt2", "bloom"),
    ap.RopeScaling(kind="linear", factor=2.0): ("llama",),
    ap.NoPosition(home=None): ("llama", "gpt2", "bloom"),
    ap.Sinusoidal(): ("gpt2",),
    ap.Flash(backend="sdpa"): ("gpt2", "bloom"),
}
ORDERS = [(kind, MEMORY, patch) for patch, kinds in BENEATH.items() for kind in kinds]
ORDERS += [("llama", EXTEND, ap.Rotary(theta=500.0)), ("llama", EXTEND, ap.RopeScaling(kind="linear", factor=2.0))]
ORDERS += [("llama", ap.AttentionSinks(num_sinks=2, window=6), ap.Rotary(theta=500.0))]


@pytest.mark.parametrize(("model_type", "above", "beneath"), ORDERS, ids=lambda value: getattr(value, "name", value))
def test_one_that_comes_beneath_another_is_as_if_it_had_come_first(model_type, above, beneath, tmp_path):
    """Oracle: the other order, in two calls; its record is equal, and a checkpoint of it loads to the same logits."""
    kernel = "eager" if isinstance(beneath, ap.Flash) else None
    torch.manual_seed(0)
    wanted = patched(model_type, beneath, above, kernel=kernel)
    torch.manual_seed(0)
    model = patched(model_type, above, kernel=kernel)
    first, before = logits(model), snapshot(model)
    report = ap.apply(model, beneath)
    assert torch.equal(logits(model), logits(wanted))
    assert model.config.attnpatch["patches"] == wanted.config.attnpatch["patches"]
    assert f"{above.name}: taken off, and put on again above {beneath.name}" in str(report)
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert torch.equal(logits(ap.load(tmp_path)), logits(model))
    report.revert()
    assert torch.equal(logits(model), first)
    assert snapshot(model) == before


@pytest.mark.parametrize("above", [MEMORY, EXTEND], ids=lambda patch: patch.name)
def test_in_one_call_the_order_follows_from_what_stands_on_what(above):
    model = patched("llama", above, ap.Rotary(theta=500.0), once=True)
    wanted = patched("llama", ap.Rotary(theta=500.0), above)
    assert torch.equal(logits(model), logits(wanted))
    assert model.config.attnpatch["patches"] == wanted.config.attnpatch["patches"]


def test_a_copy_and_a_loaded_model_know_what_stands_on_what(tmp_path):
    model = patched("llama", MEMORY)
    copied = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    wanted = logits(patched("llama", ap.Rotary(theta=500.0), MEMORY))
    for other in (copied, ap.load(tmp_path)):
        ap.apply(other, ap.Rotary(theta=500.0))
        assert torch.equal(logits(other), wanted)


def test_the_later_patch_is_reverted_first():
    model = patched("llama")
    first = ap.apply(model, MEMORY)
    second = ap.apply(model, ap.Alibi())
    with pytest.raises(ap.PatchConflict, match="revert the later patch first"):
        first.revert()
    second.revert()
    first.revert()
    assert not names(model)


def test_nothing_comes_beneath_an_open_stream():
    model = patched("llama", MEMORY)
    with ap.stream(model), pytest.raises(ap.AttnPatchError, match="a stream is open"):
        ap.apply(model, ap.Rotary(theta=500.0))
    ap.apply(model, ap.Rotary(theta=500.0))


def test_what_no_record_can_put_on_again_stays():
    model = patched("llama", MEMORY)
    del model.config.attnpatch
    before = snapshot(model)
    with pytest.raises(ap.PatchConflict, match="segment_recurrence is on this model and stands in no record"):
        ap.apply(model, ap.Alibi())
    assert snapshot(model) == before


def test_a_hook_comes_back_to_its_place_among_others():
    model = patched("gpt2")
    block, called = model.transformer.h[0], []
    hooks = [lambda *_, number=number: called.append(number) for number in range(3)]
    for hook in hooks:
        block.register_forward_pre_hook(hook)
    write = RemoveHook("transformer.h.0", hooks[1]).run(model)
    logits(model)
    write.undo()
    write.undo()
    logits(model)
    assert called == [0, 2, 0, 1, 2]


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("pair", [(EXTEND, MEMORY), (MEMORY, EXTEND), (EXTEND, ap.Alibi()), (ap.Alibi(), EXTEND)])
def test_what_cannot_be_is_refused_for_a_reason_of_mathematics(pair, once):
    with pytest.raises(ap.AttnPatchError) as refused:
        patched("llama", *pair, once=once)
    assert not any(word in str(refused.value) for word in ("_attn_implementation", "revert it first"))


EXTENDED = [EXTEND, ap.ReRope(window=5, trained_length=10), ap.AttentionSinks(num_sinks=2, window=6, trained_length=20)]


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "persimmon"])
@pytest.mark.parametrize("patch", EXTENDED, ids=lambda patch: patch.name)
def test_distances_change_in_forwards_that_compute_attention_by_themselves(model_type, patch):
    """Oracles: every score computed densely, token-by-token decoding, and the text within the trained length."""
    rotary = () if model_type == "persimmon" else (ap.Rotary(theta=500.0),)
    plain, model = patched(model_type, *rotary), patched(model_type, *rotary, patch)
    found, short = logits(model), IDS[:, :6]
    assert float((logits(model, short) - logits(plain, short)).abs().max()) < FP32
    assert float((found - logits(plain)).abs().max()) > 1e-3
    cache = None
    with torch.no_grad():
        for n in range(IDS.shape[1]):
            step = model(input_ids=IDS[:, n : n + 1], use_cache=True, **{CACHE: cache})
            cache = step[CACHE]
            assert float((step.logits[:, 0] - found[:, n]).abs().max()) < 10 * FP32
    if isinstance(patch, ap.AttentionSinks):
        assert {layer.keys.shape[-2] for layer in cache.layers} == {2 + 6 - 1}
    for module in model.modules():
        if span_of(module) is not None:
            span_of(module).dense = True
    assert float((logits(model) - found).abs().max()) < 10 * FP32


def test_a_forward_of_its_own_has_no_dense_way():
    model = patched("bloom", ap.Rotary())
    with pytest.raises(ap.UnsupportedArchitecture, match="only a fused kernel can take its place"):
        ap.patch_self_extend(model, window=6, group=3, trained_length=10, backend="eager")
