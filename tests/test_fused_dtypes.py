"""A fused kernel inside forwards that compute their own scores, in short dtypes: no further off than the model is."""

import copy

import pytest
import torch
from architectures import tiny_model
from caches import CACHE

import hf_attnpatch as ap

SETTINGS = {
    "falcon": {"alibi": True, "num_hidden_layers": 1, "hidden_size": 256, "initializer_range": 0.05},
    "bloom": {"num_hidden_layers": 1, "hidden_size": 256, "initializer_range": 0.05},
    "mpt": {"n_layers": 1, "d_model": 256, "max_seq_len": 256, "initializer_range": 0.05},
    "codegen": {"n_layer": 1, "n_embd": 256, "n_positions": 256, "initializer_range": 0.05},
}
IDS = torch.arange(300).view(2, 150) * 7 % 60 + 1
MASK = torch.ones_like(IDS)
MASK[1, :40] = 0


def _logits(model):
    """In one piece, and in two by way of the cache; where tokens are no padding."""
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK).logits
        first = model(input_ids=IDS[:, :90], attention_mask=MASK[:, :90], use_cache=True)
        second = model(input_ids=IDS[:, 90:], attention_mask=MASK, **{CACHE: first[CACHE]}).logits
    return [each[seen].double() for each, seen in ((whole, MASK > 0), (second, MASK[:, 90:] > 0))]


def _far(found, wanted):
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_it_errs_as_the_model_itself_does(kind, dtype):
    model = tiny_model(kind, **SETTINGS[kind]).eval()
    wanted = _logits(model.double())
    short = copy.deepcopy(model).to(dtype)
    own = _far(_logits(short), wanted)
    report = ap.patch_flash(short)
    errors = _far(_logits(short), wanted)
    assert all(error < 1.5 * most for error, most in zip(errors, own, strict=True)), (errors, own)
    report.revert()
    assert _far(_logits(short), wanted) == own


def test_falcon_counts_its_bias_once():
    """What agrees on few tokens in bfloat16 may count it twice: the nearest of several ways is taken."""
    model = tiny_model("falcon", **SETTINGS["falcon"]).eval()
    short = copy.deepcopy(model).to(torch.bfloat16)
    ap.patch_flash(model)
    ap.patch_flash(short)
    ways = [
        {hook.unbiased for m in each.modules() for hook in m._forward_pre_hooks.values()} for each in (model, short)
    ]
    assert ways[0] == ways[1] == {True}
