"""The bench of Transformer-XL's attention runs, and its two ways compute the same."""

import json

import torch


def test_rows_and_page(monkeypatch):
    monkeypatch.syspath_prepend("scripts")
    import bench_relative as bench

    rows = [bench.measured(96, dtype, back, 1) for dtype in (torch.float32, torch.bfloat16) for back in (False, True)]
    assert rows[0]["apart"] < 1e-5
    assert set(rows[1]["seconds"]) == {"plain", "columns", "shifted"}
    found = {"machine": "x", "threads": 1, "rounds": 1, "rows": rows}
    found["peaks"] = {"columns": {"96": 1.0}, "shifted": {"96": 2.0}}
    text = bench.page(json.loads(json.dumps(found)))
    assert text.count("| 96 | float32 |") == 2
    assert "| further dimensions | 1 |" in text
    assert "and 2 times the memory.**" in text
