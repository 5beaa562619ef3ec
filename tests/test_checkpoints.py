"""Checkpoints that earlier code wrote, one of every patch, load and give the logits that it computed.

``tests/checkpoints/write.py`` wrote them, with the code before the attention room.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import hf_attnpatch as ap
from hf_attnpatch.patch import REGISTRY

HERE = Path(__file__).parent / "checkpoints"
spec = importlib.util.spec_from_file_location("write_checkpoints", HERE / "write.py")
write = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write)
EXPECTED = load_file(HERE / "logits.safetensors")


@pytest.mark.parametrize("name", write.ROWS)
def test_a_checkpoint_of_earlier_code_gives_its_logits(name):
    auto = AutoModelForMaskedLM if name.startswith("bert") else AutoModelForCausalLM
    model = auto.from_pretrained(HERE / name).eval()
    found = write.logits(model)
    assert {f"{name}.{way}" for way in found} == {key for key in EXPECTED if key.startswith(f"{name}.")}
    for way, tensor in found.items():  # the same kernels on the same numbers: what differs is the machine's summing
        torch.testing.assert_close(
            tensor, EXPECTED[f"{name}.{way}"], rtol=0, atol=2e-6, msg=lambda m, w=way: f"{w}: {m}"
        )


def test_every_patch_that_a_checkpoint_remembers_is_there():
    written = {
        entry["patch"]
        for path in HERE.glob("*/config.json")
        for entry in json.loads(path.read_text()).get("attnpatch", {}).get("patches", ())
    }
    assert written == {name for name, patch in REGISTRY.items() if patch.recorded}
    assert ap.SelfExtend.recorded
