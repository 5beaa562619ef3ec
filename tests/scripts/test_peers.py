"""The comparison with peers: what its workers find can be found false, and what is written names no machine."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.llama import modeling_llama

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(SCRIPTS / "peer_workers"))

import peers  # noqa: E402
import peers_report  # noqa: E402
import survive  # noqa: E402


def found(steps):
    return {step["step"]: step["ok"] for step in steps}


def test_this_project_passes_every_step_in_a_process_of_its_own(tmp_path):
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps({"peer": "hf_attnpatch", "threads": 1}))
    subprocess.run([sys.executable, SCRIPTS / "peer_workers/survive.py", asked, answered], check=True)
    steps = json.loads(answered.read_text())["steps"]
    assert found(steps) == dict.fromkeys(peers_report.STEPS[1:], True)


def class_wide(model):
    """A peer as they come: it exchanges a method of the class, and offers no way back."""
    kind = modeling_llama.LlamaRMSNorm
    plain = kind.forward
    kind.forward = lambda self, states: plain(self, states)
    return contextlib.nullcontext(), None


def test_a_patch_of_a_class_is_found_to_reach_other_models(monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", modeling_llama.LlamaRMSNorm.forward)
    monkeypatch.setitem(survive.APPLY, "rude", ("json", class_wide))
    steps = survive.steps("rude")
    assert found(steps)["runs here, same logits"]
    assert not found(steps)["leaves other models alone"]
    assert "LlamaRMSNorm.forward" in next(s for s in steps if s["step"] == "leaves other models alone")["detail"]
    assert not found(steps)["can be undone"]


def scaled(model):
    """A peer that changes what the model says."""
    model.lm_head.weight.data.mul_(1.5)
    return contextlib.nullcontext(), contextlib.nullcontext


def failing(model):
    """A peer that does not run here."""
    raise RuntimeError("0 active drivers\nof whatever")


def test_other_logits_and_errors_are_findings(monkeypatch):
    monkeypatch.setitem(survive.APPLY, "wrong", ("json", scaled))
    monkeypatch.setitem(survive.APPLY, "failing", ("json", failing))
    assert not found(survive.steps("wrong"))["runs here, same logits"]
    assert survive.steps("failing")[-1] == {
        "step": "patches a Llama",
        "ok": False,
        "detail": "RuntimeError: 0 active drivers",
    }


def test_pip_s_reason_is_one_line():
    said = "x: not installed\n  |     peer 1.0 depends on transformers<5.3 and >=4.56\n  | ERROR: ResolutionImpossible"
    assert peers.conflict(said) == "peer 1.0 depends on transformers<5.3 and >=4.56"
    assert (
        peers.conflict("a\n  | ERROR: No matching distribution found for x")
        == "ERROR: No matching distribution found for x"
    )


def test_an_error_is_told_without_addresses_and_folders():
    said = "exit status 1; its log, /a/b/log, ends with\n  | Traceback\n  | ImportError: no x in /home/x.py\n  | bye"
    assert peers_report.plain(said) == "ImportError: no x in ..."


ROWS = {
    "whole cache": {"nats": [2.0, 3.0], "bytes": 2048, "bytes after": 4096, "ms": [2.0]},
    "kvpress Knorm": {"nats": [2.5, 3.1], "bytes": 1024, "bytes after": 3072, "ms": [2.0]},
    "grouped query, mean": {"nats": [2.1, 3.1], "bytes": 1024, "bytes after": 2048, "ms": [1.0]},
}


def test_excess_is_against_the_whole_cache_document_by_document():
    mean, low, high = peers_report.excess(ROWS, "kvpress Knorm")
    assert mean == pytest.approx(0.3)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.5)


def test_the_table_puts_the_best_first_and_says_what_was_read():
    row = {"rows": ROWS, "versions": {"kvpress": "1", "transformers": "5"}, "documents": 2, "prefix": 8, "targets": 4}
    written = peers_report.markdown({"survive": {}, "cache": {"tiny": row}})
    names = [line.split(" | ")[0].strip("| ") for line in written.splitlines()[4:]]
    assert names == ["whole cache", "grouped query, mean", "kvpress Knorm"]
    assert "| grouped query, mean | 0.100 | 0.100 to 0.100 | 1 | 2 | 0.50 |" in written
