"""What .ci/run makes of the ways in which a step can end; `make` is a stand-in that prints what it is given."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSED = "12 passed, 3 skipped in 4.56s"
SAME = "transformers 5.24.0 is the newest and the locked one: not run twice"


def _run(tmp_path, **steps):
    """Runs .ci/run where each target of make prints a line; one that is given as (line, status) exits with it."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    cases = []
    for target, ends in {"lint": "", "test": PASSED, "test-lowest": PASSED, "test-newest": SAME, **steps}.items():
        line, status = ends if isinstance(ends, tuple) else (ends, 0)
        cases.append(f"{target}) echo 'collected'; echo '{line}'; exit {status};;")
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text("#!/bin/sh\necho ran $1\ncase $1 in\n" + "\n".join(cases) + "\nesac\n")
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", tmp_path / ".ci/run"], capture_output=True, text=True, env=environment)
    return done.returncode, [line.removeprefix("ran ") for line in done.stdout.splitlines() if line.startswith("ran ")]


def test_all_steps_run_and_a_newest_that_is_locked_needs_no_tests(tmp_path):
    assert _run(tmp_path) == (0, ["lint", "test", "test-lowest", "check-releases", "test-newest"])


@pytest.mark.parametrize("line", [PASSED, "=== 1 passed in 0.10s ==="])
def test_another_newest_is_counted(tmp_path, line):
    assert _run(tmp_path, **{"test-newest": line})[0] == 0


@pytest.mark.parametrize(
    "line", ["no tests ran in 0.01s", "7 skipped in 1.00s", "5 deselected in 0.20s", "0 passed in 1s", SAME]
)
def test_a_step_without_a_test_fails(tmp_path, line):
    status, ran = _run(tmp_path, test=line)
    assert status == 1
    assert ran == ["lint", "test"]


def test_a_status_counts_whatever_was_printed(tmp_path):
    assert _run(tmp_path, **{"test-lowest": (PASSED, 2)})[0] != 0
