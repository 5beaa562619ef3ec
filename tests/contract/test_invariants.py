"""Every invariant that holds on a model holds on it patched."""

import pytest
from matrix import applicable, architectures, verified
from outcomes import HELD, MAY_STOP_APPLYING, MOOT, UPSTREAM, UPSTREAM_MARGINAL, UPSTREAM_OF_A_KIND
from patches import CASES, build, stock_twin
from transformers import __version__

import hf_attnpatch as ap
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS

RECORDED_ON = "5.24."


def _failed(verification):
    return {finding.invariant for finding in verification.findings if finding.outcome == FAIL}


@pytest.mark.skipif(not __version__.startswith(RECORDED_ON), reason=f"recorded on transformers {RECORDED_ON}x")
@pytest.mark.parametrize(("model_type", "encoder"), architectures())
def test_what_transformers_itself_breaks_is_known(model_type, encoder):
    key = model_type + ("-masked" if encoder else "")
    found = verified(model_type, encoder)
    assert UPSTREAM[key] <= _failed(found) <= UPSTREAM[key] | UPSTREAM_MARGINAL[key], f"\n{found}"


@pytest.mark.skipif(not __version__.startswith(RECORDED_ON), reason=f"recorded on transformers {RECORDED_ON}x")
@pytest.mark.parametrize(("model_type", "encoder"), architectures())
def test_decoding_padding_and_saving_are_asked_and_answered(model_type, encoder):
    """Not applicable is no answer, but for what is listed with its reason: a check that finds nothing has failed."""
    key, found = model_type + ("-masked" if encoder else ""), verified(model_type, encoder)
    moot = {f.invariant: f.note for f in found.findings if f.outcome == NOT_APPLICABLE and f.invariant in HELD}
    assert moot == MOOT[key]
    broken = {invariant for invariant in HELD if found[invariant].outcome == FAIL}
    assert broken <= UPSTREAM[key] | UPSTREAM_MARGINAL[key], f"\n{found}"


def test_what_is_moot_has_a_reason_that_was_proved_or_follows_from_the_kind_of_model():
    reasons = {why for found in MOOT.values() for invariant, why in found.items() if invariant in HELD}
    assert reasons <= {
        "it does not generate",
        "it does not decode left-padded rows",
        "its forward takes no attention mask",
        "generate was seen to read the whole text again for each token: there is no cache",
    }


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable())
def test_every_invariant_that_held_still_holds(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = verified(model_type, encoder, case)
    report = ap.apply(model, case.patch)
    assert report.changed
    after = ap.verify(model, ways=False)
    broken = _failed(after) - _failed(before)
    if broken and report.stock:  # then they must be what transformers itself makes of the same config
        broken -= _failed(ap.verify(stock_twin(model), ways=False))
    assert not broken, f"\n{before}\n{after}"
    lost = {f.invariant for f in after.findings if f.outcome == NOT_APPLICABLE and before[f.invariant].outcome == PASS}
    assert lost <= MAY_STOP_APPLYING.get(case.name, MAY_STOP_APPLYING.get(case.kind, set())), f"\n{before}\n{after}"


@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "rope_scaling"], ids=lambda case: case.name)
def test_what_a_scaling_breaks_where_it_switches_is_known(case):
    model = build("llama", False, case)
    ap.apply(model, case.patch)
    assert _failed(ap.verify(model, ways=False)) == UPSTREAM_OF_A_KIND.get(case.name, set())


def test_the_fast_slice_has_every_case():
    cells = [cell for cell in applicable() if not cell.marks]
    assert {cell.values[2].name for cell in cells} == {case.name for case in CASES}
