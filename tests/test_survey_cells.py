"""Cells that failed in a survey, asked again as the survey asks them."""

import sys
from pathlib import Path

import pytest
import torch
from architectures import tiny_model

import hf_attnpatch as ap

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from survey_cases import CASES  # noqa: E402

WORKS = {
    (
        "doge",
        False,
        "grouped_query down",
    ): "own type",  # another module is built by the field that only caches read elsewhere
    ("big_bird", False, "position_table"): "native",  # replaces its attention modules when it first runs
    ("fnet", True, "position_table"): "native",  # has no attention
    ("layoutlm", True, "rotary"): "own type",  # hands its attention a mask that is added
}
REFUSED = {
    ("git", "relative_xl"): "see tokens after them",  # an image, whose tower keeps its own attention
    ("inkling2_text", "alibi"): "a tensor for each head",
}


@pytest.fixture(autouse=True)
def _uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("model_type", "encoder", "case"), WORKS)
def test_it_works(model_type, encoder, case):
    model = tiny_model(model_type, encoder=encoder)
    before = {
        name for name, why in CASES["unpatched"](tiny_model(model_type, encoder=encoder))["broken"].items() if why
    }
    found = CASES[case](model)
    assert found["status"] == WORKS[model_type, encoder, case]
    assert found["broken"].keys() <= before


@pytest.mark.parametrize(("model_type", "case"), REFUSED)
def test_it_is_refused_with_its_reason(model_type, case):
    try:
        found = CASES[case](tiny_model(model_type))["detail"]
    except ap.UnsupportedArchitecture as reason:
        found = str(reason)
    assert REFUSED[model_type, case] in " ".join(found.split())


def test_attention_sinks_where_modules_run_several_times():
    """Each time with a layer of the cache of its own."""
    model = tiny_model("hrm_text")
    report = ap.apply(model, ap.AttentionSinks(num_sinks=2, window=6))
    assert "equal the full forward" in report.checks["cached decoding"]
