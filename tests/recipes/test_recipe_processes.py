"""Real processes: one against two, killed against uninterrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worker import Rows, settings, tiny

from recipes import loop
from recipes.checkpoints import ResumeError, complete

WORKER = str(Path(__file__).with_name("worker.py"))


def start(output, changes, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, WORKER, str(output), json.dumps(changes), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def finished(output, changes, *flags, processes=1):
    done = start(output, changes, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    return torch.load(Path(output) / "result.pt")


def here(output, changes, dropout=0.0, resume=False):
    """The same run in this process, which is quicker."""
    torch.set_num_threads(1)
    model = tiny(dropout)
    log = loop.train(model, Rows(), loop.next_token_loss, settings(output, **changes), resume=resume)
    return {"log": log, "model": model.state_dict()}


def without_time(log):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in log]


def test_two_processes_are_the_same_training_as_one(tmp_path):
    one = here(tmp_path / "one", {"accumulation": 4})
    two = finished(tmp_path / "two", {"accumulation": 2}, processes=2)
    assert two["processes"] == 2
    for left, right in zip(one["log"], two["log"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left["tokens"] == right["tokens"]
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, atol=1e-4, rtol=0)


def test_a_killed_run_resumes_bit_equal(tmp_path):
    changes = {"accumulation": 2, "save_every": 2, "log_every": 3}
    whole = here(tmp_path / "whole", changes, dropout=0.2)
    done = start(tmp_path / "cut", changes, "--dropout", "0.2", "--kill-step", "5")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in complete(tmp_path / "cut/checkpoints")] == ["step_00000002", "step_00000004"]
    resumed = here(tmp_path / "cut", changes, dropout=0.2, resume=True)
    assert without_time(resumed["log"]) == without_time(whole["log"])
    for key, value in whole["model"].items():
        assert torch.equal(resumed["model"][key], value), key


def test_a_kill_while_writing_leaves_the_last_checkpoint(tmp_path):
    changes = {"save_every": 2, "keep": 1}
    done = start(tmp_path / "cut", changes, "--kill-in-save", "2")
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "cut/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [".tmp-step_00000004", "step_00000002"]
    with pytest.raises(ResumeError, match="pass --resume"):
        here(tmp_path / "cut", changes)
    resumed = here(tmp_path / "cut", changes, resume=True)
    whole = here(tmp_path / "whole", changes)
    assert all(torch.equal(resumed["model"][key], value) for key, value in whole["model"].items())
    assert [path.name for path in folder.iterdir()] == ["step_00000006"]


def test_resuming_something_else_is_refused(tmp_path):
    here(tmp_path, {"save_every": 6})
    with pytest.raises(ResumeError, match=r"the settings changed \(lr 0.01 -> 0.1\)"):
        here(tmp_path, {"save_every": 6, "lr": 0.1}, resume=True)
