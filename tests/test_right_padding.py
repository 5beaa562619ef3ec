"""Padding behind a text, where a window makes masks be written out: as without it. Looking ahead is still refused."""

import pytest
import torch
from architectures import tiny_model

import hf_attnpatch as ap
from hf_attnpatch.attention.masks import read_sight

IDS = torch.arange(80).view(2, 40) * 7 % 60 + 1
MODELS = {"mistral": {"sliding_window": 16}, "gemma3_text": {"sliding_window": 16}, "llama": {}}


@pytest.mark.parametrize("patch", [ap.Alibi(), ap.RelativeXl()], ids=lambda patch: patch.name)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [39, 20, 3])
def test_padding_behind_a_text_changes_nothing(kind, patch, length):
    model = tiny_model(kind, **MODELS[kind]).eval()
    ap.apply(model, patch)
    mask = torch.ones_like(IDS)
    mask[1, length:] = 0
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=mask).logits
        alone = model(input_ids=IDS[1:, :length]).logits
        whole = model(input_ids=IDS[:1]).logits
    torch.testing.assert_close(found[1:, :length], alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[:1], whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "last",
    [[5, 5, 5, 5, 5, 5, 6, 7], [0, 1, 4, 4, 4, 5, 6, 7], [7] * 8, [0, 1, 1, 2, 3, 4, 5, 6], [1, 1, 2, 3, 4, 5, 6, 7]],
)
def test_queries_that_look_ahead_are_refused(last):
    mask = torch.arange(8)[None, None, None] <= torch.tensor(last)[None, None, :, None]
    with pytest.raises(ap.AttnPatchError, match="see tokens after them"):
        read_sight(mask, True, 8, 8)


@pytest.mark.parametrize("last", [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 3, 3, 3, 3], [0] * 8])
def test_queries_that_look_back_are_not(last):
    mask = torch.arange(8)[None, None, None] <= torch.tensor(last)[None, None, :, None]
    assert read_sight(mask, True, 8, 8).mask is not None
