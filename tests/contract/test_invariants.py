"""Every invariant that holds on a model holds on it patched."""

import pytest
from matrix import applicable, architectures, verified
from outcomes import MAY_STOP_APPLYING, UPSTREAM, UPSTREAM_MARGINAL, UPSTREAM_OF_A_KIND
from patches import CASES, build, stock_twin
from transformers import __version__

import hf_attnpatch as ap
from hf_attnpatch.verify import FAIL, NOT_APPLICABLE, PASS

RECORDED_ON = "5.23."


def _failed(verification):
    return {finding.invariant for finding in verification.findings if finding.outcome == FAIL}


@pytest.mark.skipif(not __version__.startswith(RECORDED_ON), reason=f"recorded on transformers {RECORDED_ON}x")
@pytest.mark.parametrize(("model_type", "encoder"), architectures())
def test_what_transformers_itself_breaks_is_known(model_type, encoder):
    key = model_type + ("-masked" if encoder else "")
    found = verified(model_type, encoder)
    assert UPSTREAM[key] <= _failed(found) <= UPSTREAM[key] | UPSTREAM_MARGINAL[key], f"\n{found}"


@pytest.mark.parametrize(("model_type", "encoder", "case"), applicable())
def test_every_invariant_that_held_still_holds(model_type, encoder, case):
    model = build(model_type, encoder, case)
    before = verified(model_type, encoder, case)
    report = ap.apply(model, case.patch)
    assert report.changed
    after = ap.verify(model)
    broken = _failed(after) - _failed(before)
    if broken and report.stock:  # then they must be what transformers itself makes of the same config
        broken -= _failed(ap.verify(stock_twin(model)))
    assert not broken, f"\n{before}\n{after}"
    lost = {f.invariant for f in after.findings if f.outcome == NOT_APPLICABLE and before[f.invariant].outcome == PASS}
    assert lost <= MAY_STOP_APPLYING.get(case.kind, set()), f"\n{before}\n{after}"


@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "rope_scaling"], ids=lambda case: case.name)
def test_what_a_scaling_breaks_where_it_switches_is_known(case):
    model = build("llama", False, case)
    ap.apply(model, case.patch)
    assert _failed(ap.verify(model)) == UPSTREAM_OF_A_KIND.get(case.name, set())


def test_the_fast_slice_has_every_case():
    cells = [cell for cell in applicable() if not cell.marks]
    assert {cell.values[2].name for cell in cells} == {case.name for case in CASES}
