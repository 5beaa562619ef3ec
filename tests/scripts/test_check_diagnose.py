"""The check of predictions: what it compares, and what it writes, from rows that were not measured."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_diagnose


def row(variant, prefill, decode, predicted_prefill, predicted_decode, size=100):
    name = {
        "model": "tiny",
        "variant": variant,
        "context": 32,
        "rounds": 2,
        "cache bytes": 100,
        "predicted cache bytes": size,
    }
    predicted = {"predicted prefill": predicted_prefill, "predicted decode": predicted_decode}
    return {**name, "prefill": prefill, "decode": decode, **predicted}


ROWS = [row("as it is", 2, 4, 2.2, 3), row("1 key-value head", 2, 2, 2, 1), row("eager", 6, 8, 6.6, 12, size=99)]
FOUND = {"rows": ROWS, "machine": "box", "torch": "2", "transformers": "5"}


def test_gains_are_ratios_to_the_model_as_it_is():
    gains = {(r["variant"], r["what"]): r for r in check_diagnose.ratios(ROWS) if "gain" in r["what"]}
    grouped = gains["grouped query, 1 key-value head", "gain in decode"]
    assert (grouped["predicted"], grouped["measured"]) == (3, 2)
    flash = gains["flash", "gain in prefill"]
    assert (flash["predicted"], flash["measured"]) == (pytest.approx(3), 3)
    assert len(gains) == 4


def test_what_missed_is_marked():
    text = check_diagnose.markdown(FOUND)
    assert "| tiny | as it is | 32 | prefill | 2200.00 ms | 2000.00 ms | 1.10 |" in text
    assert "query, 1 key-value head | 32 | gain in decode | 3.00 times | 2.00 times | **1.50** |" in text
    assert "| tiny | eager | 32 | cache bytes | 99 | 100 | **0.99** |" in text
    assert "8 of 13 are within 25% (cache bytes: exact)" in text


def test_the_figure_is_drawn(tmp_path):
    check_diagnose.figure(FOUND, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
