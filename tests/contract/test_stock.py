"""What stock transformers can express, stock transformers loads: in a process that never imports this package."""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from matrix import applicable
from patches import build
from transformers import PretrainedConfig

import hf_attnpatch as ap
from hf_attnpatch.checkpoint import auto_class
from hf_attnpatch.probe import default_inputs, trace

_STOCK = """
import json, sys
import torch
import transformers

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
found = {}
for line in open(sys.argv[1]):
    cell = json.loads(line)
    probe = torch.load(cell["folder"] + "/probe.pt")
    auto = getattr(transformers, cell["auto"])
    try:
        model = auto.from_pretrained(cell["folder"], attn_implementation=cell["attention"]).eval()
    except Exception as error:
        found[cell["name"]] = f"{type(error).__name__}: {error}"[:300]
        continue
    for tensor in (*model.parameters(), *model.buffers()):  # off the mapped file: odd addresses round otherwise
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        logits = model(**probe["inputs"], **({"use_cache": False} if cell["use_cache"] else {})).logits
    wanted = probe["logits"]
    mask = probe["inputs"].get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    found[cell["name"]] = "equal" if torch.equal(logits, wanted) else float((logits - wanted).abs().max())
assert "hf_attnpatch" not in sys.modules
json.dump(found, open(sys.argv[2], "w"))
"""


def _cells(full):
    for cell in applicable("grouped_query", "rope_scaling"):
        if full or not cell.marks:
            yield cell.id, *cell.values


def _save(folder, name, model_type, encoder, case):
    """Patch and save a model; None where its checkpoint is not a stock one."""
    model = build(model_type, encoder, case)
    if not ap.apply(model, case.patch).stock:
        return None
    folder.mkdir()
    model.save_pretrained(folder)  # this also writes the architecture into the config
    try:
        auto = auto_class(model.config).__name__
    except ap.AttnPatchError:
        return None  # a part of a larger model, which no Auto class of stock transformers loads
    inputs = default_inputs(model)
    torch.save({"inputs": inputs, "logits": trace(model, inputs).logits}, folder / "probe.pt")
    return {
        "name": name,
        "folder": str(folder),
        "auto": auto,
        "attention": _attention(model.config),
        "use_cache": "use_cache" in inspect.signature(model.forward).parameters,
    }


def _attention(config):
    """As ``from_pretrained`` takes it; by part where parts differ (GOT-OCR2's decoder has another than its tower)."""
    parts = {name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}
    if {part._attn_implementation for part in parts.values()} <= {config._attn_implementation}:
        return config._attn_implementation
    return {"": config._attn_implementation, **{name: part._attn_implementation for name, part in parts.items()}}


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=[pytest.mark.full, pytest.mark.timeout(3600)])])
def test_stock_transformers_gives_the_same_bits(full, tmp_path):
    cells = [_save(tmp_path / name, name, *cell) for name, *cell in _cells(full)]
    cells = [cell for cell in cells if cell is not None]
    lines, out = tmp_path / "cells.jsonl", tmp_path / "found.json"
    lines.write_text("\n".join(json.dumps(cell) for cell in cells))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _STOCK, str(lines), str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert set(found) == {cell["name"] for cell in cells}
    assert {"llama-grouped_2_mean", "gemma3_text-rope_yarn", "phi3-grouped_2_mean"} <= set(found)
    assert {name: difference for name, difference in found.items() if difference != "equal"} == {}
