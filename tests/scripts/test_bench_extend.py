"""The bench of context extension runs, and its rivals compute what they are named for."""

import json
import sys

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend("scripts")
    import bench_extend

    return bench_extend


def test_rows_and_tables(bench, monkeypatch):
    monkeypatch.setattr(bench, "METHODS", ("self_extend", "attention_sinks"))
    found = {"machine": "x", "threads": 1, "rounds": 1}
    found["prefill"] = [bench.attention(128, 128, 1)]
    found["step"] = [bench.attention(128, 1, 1)]
    found["decoding"] = [bench.decoding(128, 1, steps=2)]
    found["memory"] = [{"what": name, "length": 128, "MiB": 1.0} for name in ("plain", *bench.METHODS)]
    assert set(found["prefill"][0]["seconds"]) == {"plain", "self_extend", "attention_sinks"}
    text = bench.markdown(json.loads(json.dumps(found)))
    assert text.count("| self_extend |") == 4
    assert text.count("128 tokens") == 4
    assert "hf_attnpatch" in sys.modules


def test_the_distances_are_the_defaults_at_a_quarter_of_the_length(bench):
    assert bench.default_span("jet_long", 1024).trained == 1024
    assert bench.default_span("attention_sinks", 1024).window == 1020
