"""Position patches under autocast: as right as the same model in the short dtype itself."""

import copy

import pytest
import torch
from architectures import tiny_model

import hf_attnpatch as ap

LENGTH = 400
IDS = torch.arange(LENGTH)[None] * 7 % 60 + 1
WIDE = {"max_position_embeddings": 512, "initializer_range": 0.1}
MODELS = {
    "llama": WIDE,  # rotary angles leave queries and keys in float32, though autocast is on
    "gpt_neox": WIDE,
    "gpt2": {"n_positions": 512, "initializer_range": 0.1},
    "bert": WIDE,
}
PATCHES = {"alibi": ap.Alibi(), "eager": ap.Alibi(backend="eager"), "relative": ap.RelativeXl()}


def _far(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("kind", MODELS)
def test_autocast_errs_no_more_than_bfloat16(kind, patch):
    model = tiny_model(kind, **MODELS[kind]).eval()
    ap.apply(model, PATCHES[patch])
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(input_ids=IDS).logits
        short = copy.deepcopy(model).to(torch.bfloat16)(input_ids=IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=IDS).logits
    assert _far(found, wanted) < 1.5 * _far(short, wanted)


def test_gradients_come_through_autocast():
    model = tiny_model("llama", **WIDE)
    ap.patch_alibi(model, training=True)
    found = []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


def test_a_clipped_distance_counts_from_the_query_in_float16():
    """In float16 a hidden key has the lowest number of the dtype: it was taken for one that is seen."""
    model = tiny_model("llama", **WIDE).eval()
    ap.patch_alibi(model, backend="eager", distance_clip=5)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        wanted = model(input_ids=IDS[:, :40], attention_mask=mask).logits[:, 7:].double()
        found = model.half()(input_ids=IDS[:, :40], attention_mask=mask).logits[:, 7:]
    assert _far(found, wanted) < 5e-3
