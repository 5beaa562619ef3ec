"""torch.export, ONNX and torch.compile of patched models, at any length and for forwards that stay."""

import importlib.util
from inspect import signature

import pytest
import torch
from architectures import tiny_model
from torch import nn
from transformers import LlamaModel

import hf_attnpatch as ap
from hf_attnpatch.functional.alibi import BITS, parts

IDS = torch.arange(5, 37).view(2, 16)
EXPORTED = [
    ("llama", ap.GroupedQuery(num_kv_heads=2)),
    ("llama", ap.Alibi()),
    ("llama", ap.RelativeXl()),
    ("llama", ap.NoPosition()),
    ("llama", ap.Sinusoidal()),
    ("llama", ap.PositionTable(length=64)),
    ("llama", ap.Rotary(theta=500.0)),
    ("llama", ap.RopeScaling(kind="yarn", factor=4.0)),
    ("gpt2", ap.GroupedQuery(num_kv_heads=2)),
    ("gpt2", ap.Alibi()),
]
WITH_NAMES = pytest.mark.parametrize(("model_type", "patch"), EXPORTED, ids=[f"{t}-{p.name}" for t, p in EXPORTED])
OLD = "cache_position" in signature(LlamaModel.forward).parameters
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def exported(model_type, patch):
    if isinstance(patch, (ap.Alibi, ap.RelativeXl)) and OLD:
        pytest.skip("this transformers makes masks from places in tensors, which an exported program has none of yet")
    model, free = tiny_model(model_type).eval(), torch.export.Dim.DYNAMIC
    ap.apply(model, patch)
    return model, torch.export.export(Logits(model), (IDS,), dynamic_shapes=({0: free, 1: free},))


def check(model, run):
    for length in (3, 5, 24):
        ids = torch.arange(5, 5 + 2 * length).view(2, length)
        with torch.no_grad():
            torch.testing.assert_close(run(ids), model(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)


@WITH_NAMES
def test_an_exported_program_runs_at_any_length(model_type, patch):
    model, program = exported(model_type, patch)
    check(model, program.module())


@ONNX
@WITH_NAMES
def test_onnx_runs_at_any_length(model_type, patch, tmp_path):
    """Some seconds each: torch translates the whole program."""
    import onnxruntime

    model, program = exported(model_type, patch)
    torch.onnx.export(program, (IDS,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    check(model, lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0]))


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon", "gptj", "codegen"])
@pytest.mark.parametrize("patch", [ap.Flash(backend="sdpa"), ap.Alibi(), ap.RelativeXl()], ids=lambda p: p.name)
def test_forwards_that_stay_compile(model_type, patch):
    if model_type == "mpt" and OLD:
        pytest.skip("this transformers gives MPT masks in which padding sees what is after it: refused")
    torch._dynamo.reset()
    model = tiny_model(model_type).eval()
    ap.apply(model, patch)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(input_ids=IDS).logits
        torch.testing.assert_close(found, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [BITS, 11, 24])
def test_parts_of_a_slope_are_short_and_their_sum_is_near(bits):
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(
        -30, 20
    ).repeat(20)
    found = parts(torch.cat([values, -values, torch.zeros(1)]), 3, bits)
    for part in found:
        significand, _ = torch.frexp(part)
        assert torch.equal((significand * 2.0**bits).round(), significand * 2.0**bits)  # no more bits than asked for
    rest = torch.cat([values, -values, torch.zeros(1)]) - sum(found)
    assert bool((rest.abs() <= torch.cat([values, values, torch.zeros(1)]) * 2.0 ** (-3 * bits)).all())
