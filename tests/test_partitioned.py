"""Checkpoints under DeepSpeed ZeRO-3, whose parameters are empty while a model is built."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import tiny_model
from snapshot import snapshot
from torch import nn

import hf_attnpatch as ap
from hf_attnpatch.edits import whole_shapes

DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def partitioned(model):
    """Leave of each parameter what ZeRO-3 leaves: nothing, and its shape."""
    empty = {id(p): nn.Parameter(p.detach().new_empty(0)) for p in model.parameters()}  # tied ones stay tied
    for parameter in model.parameters():
        empty[id(parameter)].ds_shape = parameter.shape
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = empty[id(parameter)]
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("patch", [ap.GroupedQuery(num_kv_heads=2), ap.Alibi(), ap.RelativeXl()], ids=lambda p: p.name)
def test_a_partitioned_model_is_refused_by_name(model_type, patch):
    model = partitioned(tiny_model(model_type))
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match="is partitioned by DeepSpeed ZeRO-3.*load the result under"):
        ap.apply(model, patch)
    assert snapshot(model) == before


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
def test_shapes_are_read_as_if_all_were_here_and_everything_is_put_back(model_type):
    whole, model = tiny_model(model_type), partitioned(tiny_model(model_type))
    before = dict(model.named_parameters())
    with whole_shapes(model):
        assert ap.describe(model) == ap.describe(whole)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
        assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@DEEPSPEED
def test_checkpoints_load_under_zero_3(tmp_path):
    """Half a minute: two processes, every patch that leaves a record, and what only other families have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, "--master_addr", "127.0.0.1", "--master_port", port, here / "two_ranks_zero3.py", tmp_path]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (here.parent, here))), "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found
    assert set(found.values()) == {"all tensors equal, all partitioned"}, found
