"""Heads are shared by running attention modules again on recorded calls: within fused forwards, too."""

import copy

import pytest
import torch
from architectures import tiny_inputs, tiny_model

import hf_attnpatch as ap


@pytest.mark.parametrize("first", [ap.Alibi(), ap.Flash(), ap.RelativeXl()], ids=lambda patch: patch.name)
@pytest.mark.parametrize("kind", ["gptj", "codegen", "bloom", "mpt"])
def test_heads_are_aligned_as_without_it(kind, first):
    model = tiny_model(kind).eval()
    heads = ap.describe(model).sites[0].num_kv_heads
    ap.apply(model, first)
    plain = copy.deepcopy(model)
    report = ap.patch_grouped_query(model, num_kv_heads=heads // 2)
    with torch.no_grad():
        found = model(**tiny_inputs(model)).logits
        assert found.isfinite().all()
        assert report.checks
        report.revert()
        assert torch.equal(model(**tiny_inputs(model)).logits, plain(**tiny_inputs(plain)).logits)


@pytest.mark.parametrize("kind", ["gptj", "codegen"])
def test_the_new_weights_are_those_of_the_model_without_it(kind):
    made = []
    for flash in (False, True):
        model = tiny_model(kind).eval()
        if flash:
            ap.patch_flash(model)
        ap.patch_grouped_query(model, num_kv_heads=ap.describe(model).sites[0].num_kv_heads // 2)
        made.append(dict(model.named_parameters()))
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, rtol=1e-4, atol=1e-5)
