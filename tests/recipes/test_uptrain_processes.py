"""The uptraining recipe on two processes, whole and sharded, and launchers that do not do what they say."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from uptraining import launch, outcome, written

from recipes import sharding

ROOT = Path(__file__).resolve().parents[2]


def spread(path, processes=2, script=ROOT / "recipes/uptrain.py"):
    """Runs the recipe on several processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(script), "--config", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.usefixtures("no_reload")
def test_two_processes_are_the_same_uptraining_as_one(folder, monkeypatch):
    launch(monkeypatch, written(folder, train={"output": str(folder / "one")}))
    done = spread(written(folder, processes=2, train={"output": str(folder / "two")}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("max difference 0") == 1
    (one, left), (two, right) = outcome(folder / "one"), outcome(folder / "two")
    assert two["machine"]["processes"] == 2
    for stage in ("original", "converted", "uptrained"):
        assert two["scores"][stage]["nats"] == pytest.approx(one["scores"][stage]["nats"], abs=1e-5)
        assert two["scores"][stage]["tokens"] == one["scores"][stage]["tokens"]
    assert [record["loss"] for record in left] == pytest.approx([record["loss"] for record in right], abs=1e-5)


@pytest.mark.usefixtures("no_reload")
def test_a_sharded_model_is_gathered_and_is_the_same(folder, monkeypatch):
    launch(monkeypatch, written(folder, train={"output": str(folder / "one"), "eval_every": 1}))
    path = written(folder, processes=2, train={"output": str(folder / "two"), "eval_every": 1})
    done = spread(path, script=Path(__file__).with_name("sharded_worker.py"))
    assert done.returncode == 0, done.stderr
    (one, left), (two, right) = outcome(folder / "one"), outcome(folder / "two")
    assert two["reload"]["max_difference"] == 0
    assert two["scores"]["uptrained"]["nats"] == pytest.approx(one["scores"]["uptrained"]["nats"], abs=1e-5)
    for before, after in zip(left, right, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["heldout_loss"] == pytest.approx(before["heldout_loss"], abs=1e-5)


def test_parallelism_that_hides_gradients_is_refused():
    kinds = [("NO", False), ("MULTI_GPU", False), ("FSDP", True)]
    for kind, second in kinds:
        sharding.check(SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=second))
    for kind in ("FSDP", "DEEPSPEED"):
        with pytest.raises(ValueError, match=f"{kind}: the recipes train with"):
            sharding.check(SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False))


def test_fewer_processes_than_asked_for_is_an_error(folder, monkeypatch):
    with pytest.raises(ValueError, match="2 were asked for, this run has 1.*torchrun"):
        launch(monkeypatch, written(folder, processes=2))
