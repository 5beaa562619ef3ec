"""The bench runs through on small models and writes what it says."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_apply
import bench_report


def test_quick_run(tmp_path, monkeypatch, capsys):
    page = bench_apply.readme.holder("bench")
    before = page.read_text()
    monkeypatch.setattr(sys, "argv", ["bench_apply.py", "--quick", "--out", str(tmp_path)])
    bench_apply.main()
    found = json.loads((tmp_path / "bench_apply.json").read_text())
    assert (tmp_path / "bench_apply.png").stat().st_size > 10_000
    assert [len(found[part]) for part in ("forward", "apply", "memory")] == [4, 3, 1]
    for row in found["forward"]:
        low, high = row["interval"]
        assert 0 < low <= row["ratio"] <= high
    memory = found["memory"][0]
    assert memory["new weights MiB"] * 4 == memory["old weights MiB"]  # 8 heads to 2
    assert all(row["what"] in bench_report.markdown(found) for part in ("forward", "apply") for row in found[part])
    assert page.read_text() == before  # only a run into the default folder writes there
    assert "weights / copy" in capsys.readouterr().out
