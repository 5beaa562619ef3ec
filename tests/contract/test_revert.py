"""Reverting puts back every object and every bit; a refusal touches none."""

import pytest
import torch
from matrix import applicable, idle, refused
from outcomes import refusal
from patches import IDENTITIES, build
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.probe import default_inputs, trace


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable())
def test_revert_is_bitwise(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = snapshot(model)
    report = ap.apply(model, case.patch)
    assert snapshot(model) != before
    report.revert()
    after = snapshot(model)
    for part in before:
        assert after[part] == before[part], part
    report.revert()  # once more does nothing
    assert snapshot(model) == before


@pytest.mark.parametrize(("model_type", "encoder", "case"), refused())
def test_a_refusal_says_why_and_touches_nothing(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = snapshot(model)
    reason = refusal(model_type, encoder, case)
    with pytest.raises(ap.AttnPatchError) as caught:
        ap.apply(model, case.patch)
    assert reason in " ".join(str(caught.value).split())
    assert snapshot(model) == before


@pytest.mark.parametrize(("model_type", "encoder", "case"), idle())
def test_where_there_is_nothing_to_do_nothing_is_done(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = snapshot(model)
    report = ap.apply(model, case.patch)
    assert not report.changed
    assert report.record is None
    assert snapshot(model) == before


@pytest.mark.parametrize("case", IDENTITIES, ids=lambda case: case.name)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "phi3"])
def test_identity_settings_change_no_bit(model_type, case):
    model = build(model_type, False, case)
    inputs, before = default_inputs(model), snapshot(model)
    logits = trace(model, inputs).logits
    report = ap.apply(model, case.patch)
    assert not report.changed
    assert snapshot(model) == before
    assert (trace(model, inputs).logits == logits).all()


def test_a_probe_leaves_no_state():
    """RecurrentGemma's modules keep the state of the last forward."""
    model = build("recurrent_gemma", False, IDENTITIES[0])
    trace(model, default_inputs(model))
    inputs, before = default_inputs(model), snapshot(model)
    with torch.no_grad():
        model(**inputs)
    assert snapshot(model) != before
    kept = snapshot(model)
    trace(model, inputs)
    assert snapshot(model) == kept


def test_reverts_must_go_backwards():
    model = build("llama", False, IDENTITIES[0])
    before = snapshot(model)
    first = ap.patch_grouped_query(model, num_kv_heads=2)
    second = ap.patch_grouped_query(model, num_kv_heads=1)
    between = snapshot(model)
    with pytest.raises(ap.PatchConflict, match="revert the later patch first"):
        first.revert()
    assert snapshot(model) == between
    second.revert()
    first.revert()
    assert snapshot(model) == before


def test_patched_reverts_when_the_block_raises():
    model = build("gpt2", False, IDENTITIES[0])
    before = snapshot(model)
    inside = []

    def block():
        with ap.patched(model, ap.GroupedQuery(num_kv_heads=2)):
            inside.append(snapshot(model))
            raise KeyError("in the block")

    with pytest.raises(KeyError):
        block()
    assert inside[0] != before
    assert snapshot(model) == before
