"""The bench of ALiBi runs, and its rivals compute the same."""

import json
import sys

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend("scripts")
    import bench_alibi

    return bench_alibi


def test_rivals_run_in_turns(bench):
    order = []
    found = bench.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert set(found) == {"a", "b"}


def test_rows_and_tables(bench, tmp_path):
    found = {"machine": "x", "threads": 1, "rounds": 1}
    found["attention"] = [bench.attention(64, torch.float32, 1)]
    found["prefill"] = [bench.prefill("mpt", 64, 1, 1)]
    found["truth"] = [bench.truth("bloom", 64)]
    found["memory"] = [{"what": "attention", "length": 64, "MiB": 1.0}]
    assert found["prefill"][0]["logits"] < 1e-5
    assert max(found["truth"][0][name] for name in ("stock", "fused")) < 1e-5
    text = bench.markdown(json.loads(json.dumps(found)))
    assert text.count("| 64 |") == 3
    bench.figure(found, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert "hf_attnpatch" in sys.modules
