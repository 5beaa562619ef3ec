"""A fused kernel inside the forwards of families that do not dispatch: the same logits, from less memory."""

import copy

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from tolerances import ROUNDING
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import hf_attnpatch as ap
from hf_attnpatch.attention.registry import FUSED
from hf_attnpatch.probe import largest_difference

FAMILIES = {
    "bloom": ("bloom", {}),
    "mpt": ("mpt", {}),
    "gptj": ("gptj", {}),
    "codegen": ("codegen", {}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {}),
    "falcon alibi": ("falcon", {"alibi": True}),
    "falcon alibi eager": ("falcon", {"alibi": True, "attn_implementation": "eager"}),
    "falcon alibi multi-query": ("falcon", {"alibi": True, "multi_query": True}),
    "falcon rope": ("falcon", {"attn_implementation": "eager"}),
    "bloom, 6 heads": ("bloom", {"n_head": 6, "hidden_size": 96}),
    "mpt, 6 heads": ("mpt", {"n_heads": 6, "d_model": 96}),
}
families = pytest.mark.parametrize("name", FAMILIES)


def _model(name, dtype=torch.float32):
    model_type, overrides = FAMILIES[name]
    return tiny_model(model_type, dtype=dtype, **overrides)


def _padded(model, length=24):
    inputs = tiny_inputs(model, length=length)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :5] = 0
    return {**inputs, "attention_mask": mask}, mask.bool()


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return out


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_logits_stay_with_and_without_a_cache(name, dtype):
    model = _model(name, dtype)
    inputs, seen = _padded(model)
    with torch.no_grad():
        wanted = model(**inputs, use_cache=False).logits
        ap.patch_flash(model)
        dispatches = ap.describe(model).sites[0].dispatches  # GPT-J and CodeGen from 5.24 on
        assert model.config._attn_implementation == ("sdpa" if dispatches else FUSED)
        found = model(**inputs, use_cache=False).logits
        cached = model(**inputs, use_cache=True)
    assert largest_difference(wanted[seen], found[seen]) < ROUNDING[dtype]
    assert torch.equal(cached.logits[seen], found[seen])


@pytest.mark.parametrize(
    ("name", "cache"),
    # MPT and Falcon do not run with a static cache in 5.23, patched or not
    [*((name, "dynamic") for name in FAMILIES), ("bloom", "static"), ("gptj", "static"), ("codegen", "static")],
)
def test_greedy_generation_is_the_same(name, cache):
    model = _model(name)
    inputs, _ = _padded(model, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(**inputs, **options)
    ap.patch_flash(model)
    made = {CACHE: StaticCache(config=model.config, max_cache_len=20)} if cache == "static" else {}
    assert torch.equal(model.generate(**inputs, **options, **made), wanted)


@families
def test_gradients_are_those_of_the_stock_model(name):
    model = _model(name).train()
    inputs, seen = _padded(model)
    gradients = []
    for patched in (False, True):
        if patched:
            ap.patch_flash(model, training=True)
        model.zero_grad()
        model(**inputs, use_cache=False).logits[seen].square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, wanted in gradients[0].items():
        scale = wanted.abs().max().clamp_min(1e-4)
        assert (gradients[1][parameter] - wanted).abs().max() < 1e-4 * scale, parameter


@pytest.mark.parametrize("name", ["bloom", "mpt", "gptj"])
def test_memory_is_linear_in_length(name):
    sizes = {}
    for patched in (False, True):
        for length in (128, 256):
            model = tiny_model(FAMILIES[name][0], n_positions=256, max_seq_len=256, attn_implementation="eager")
            if patched:
                ap.patch_flash(model)
            inputs, _ = _padded(model, length)
            with torch.no_grad(), _Largest() as largest:
                model(**inputs, use_cache=False)
            sizes[patched, length] = largest.size
    assert sizes[False, 256] > 3 * sizes[False, 128]
    assert sizes[True, 256] <= 2.1 * sizes[True, 128]


def test_dropout_is_applied_in_training_and_only_there():
    model = tiny_model("bloom", attention_dropout=0.5)
    ap.patch_flash(model, training=True)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_chunks_on_a_cache_equal_the_whole():
    model = _model("bloom")
    ap.patch_flash(model)
    inputs, seen = _padded(model)
    with torch.no_grad():
        wanted = model(**inputs).logits
        first = {key: value[:, :10] for key, value in inputs.items()}
        past = model(**first, use_cache=True)[CACHE]
        rest = model(inputs["input_ids"][:, 10:], attention_mask=inputs["attention_mask"], **{CACHE: past}).logits
    torch.testing.assert_close(rest[seen[:, 10:]], wanted[:, 10:][seen[:, 10:]], rtol=0, atol=1e-5)


def test_a_copy_goes_its_own_way():
    model = _model("mpt")
    ap.patch_flash(model)
    twin, inputs = copy.deepcopy(model), tiny_inputs(model)
    twin.config._attn_implementation_internal = "eager"
    with torch.no_grad():
        wanted = model(**inputs).logits
        torch.testing.assert_close(twin(**inputs).logits, wanted, rtol=0, atol=1e-5)
        assert model.config._attn_implementation == FUSED
        next(twin.transformer.blocks[0].attn.Wqkv.parameters()).zero_()
        assert torch.equal(model(**inputs).logits, wanted)


def test_attention_weights_are_refused_not_made_up():
    model = _model("bloom")
    ap.patch_flash(model)
    with pytest.raises(ap.AttnPatchError, match="return no attention weights; call without output_attentions"):
        model(**tiny_inputs(model), output_attentions=True)


def test_a_second_flash_finds_it_done_and_revert_gives_everything_back():
    model = _model("bloom")
    report = ap.patch_flash(model)
    assert not ap.patch_flash(model).changed
    report.revert()
    assert model.config._attn_implementation == "eager"
    assert not model.transformer.h[0].self_attention._forward_pre_hooks


@pytest.mark.parametrize("order", [0, 1])
def test_grouped_heads_and_flash_in_either_order(order):
    model, inputs = _model("bloom"), None
    inputs, seen = _padded(model)
    twin = copy.deepcopy(model)
    ap.patch_grouped_query(twin, num_kv_heads=2, method="mean")
    patches = [ap.GroupedQuery(num_kv_heads=2, method="mean"), ap.Flash()]
    for patch in patches[:: 1 - 2 * order]:
        ap.apply(model, patch)
    with torch.no_grad():
        found, wanted = model(**inputs, use_cache=True), twin(**inputs, use_cache=True)
    assert largest_difference(wanted.logits[seen], found.logits[seen]) < 1e-5
    assert found[CACHE].layers[0].keys.shape[1] == 2


class _Clipped(nn.Module):
    """Does to its scores what nobody has taught the notes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, scores):
        return self.inner(scores.clamp(max=1.0) if hasattr(scores, "clamp") else torch.clamp(scores, max=1.0))


def test_a_forward_that_does_something_else_is_refused_by_name():
    model = _model("bloom")
    for block in model.transformer.h:
        block.self_attention.attention_dropout = _Clipped(block.self_attention.attention_dropout)
    with pytest.raises(ap.UnsupportedArchitecture, match="clamp on weights of attention"):
        ap.patch_flash(model)
    assert model.config._attn_implementation == "eager"


def test_nobody_else_gets_these_masks():
    ap.patch_flash(_model("bloom"))
    with pytest.raises(ValueError, match=FUSED):
        tiny_model("bloom", attn_implementation=FUSED)
