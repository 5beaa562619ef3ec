"""Measures one cell in a process of its own, so that its peak memory is its own.

python -m recipes.grouped_query.worker SPEC.json RESULT.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import cache_bytes_per_token, document_losses
from hf_attnpatch.evaluation.memory import peak_memory
from hf_attnpatch.patch import from_spec
from recipes import calibration, settings
from recipes.calibration import CalibrationConfig
from recipes.data import DataError
from recipes.evaluate import Window, heldout_windows
from recipes.job import HeldoutConfig
from recipes.sources import load_model, load_tokenizer

MB = 1e6


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a model as a cell says, and measures it.

    Args:
        spec: of a `Cell` of the kind `convert`, and `threads`; `figure` is where the damage is drawn, if anywhere.

    Returns:
        `losses` (document -> sum in nats, tokens), `cache_bytes_per_token`, and `conversion` where there was one.
    """
    torch.set_num_threads(spec["threads"])
    tokenizer = load_tokenizer(spec["model"])
    windows = evaluation_windows(spec, tokenizer)
    patch = None if spec["patch"] is None else from_spec(spec["patch"])
    patches = [] if patch is None else [patch]
    if spec["calibration"] is not None:
        patches = calibration.load(CalibrationConfig(**spec["calibration"]), tokenizer).give(patches)
    model = load_model(spec["model"], "float32")
    found: dict[str, Any] = {}
    if patches:
        found["conversion"] = convert(model, patches[0], spec.get("figure"))
    with torch.no_grad():
        found["cache_bytes_per_token"] = cache_bytes_per_token(model)
    losses = document_losses(model, windows, batch=spec["batch"], progress="evaluating")
    return {"losses": {str(key): list(pair) for key, pair in losses.items()}, **found}


def evaluation_windows(spec: Mapping[str, Any], tokenizer: Any) -> list[Window]:
    """Windows of all evaluation texts; documents are called `domain/number`."""
    found = []
    for source, domain in spec["evaluation"].items():
        config = HeldoutConfig(source=source, block=spec["block"], windows=spec["windows"], documents=spec["documents"])
        for window in heldout_windows(config, tokenizer):
            found.append({**window, "document": f"{domain}/{window['document']}"})
    return found


def convert(model: PreTrainedModel, patch: ap.Patch, figure: str | None) -> dict[str, Any]:
    """Converts a model; says how long it took and what it needed beside the loaded model.

    Returns:
        `seconds` (wall), `cpu_seconds`, `model_mb` (parameters), `peak_mb` (resident memory at its highest, less that
        of the loaded model; None off Linux), and the `damage`.
    """
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None])  # weights are mapped in when they are first read
    gc.collect()
    with peak_memory(torch.device("cpu")) as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        report = ap.apply(model, patch)
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    size = sum(each.numel() * each.element_size() for each in model.parameters()) / MB
    damage = None if report.damage is None else report.damage.to_dict()
    if figure and report.damage is not None:
        Path(figure).parent.mkdir(parents=True, exist_ok=True)
        report.damage.save_figure(figure)
    return {
        **took,
        "model_mb": size,
        "peak_mb": None if peak.more is None else peak.more / MB,
        "stock": report.stock,
        "damage": damage,
    }


def main() -> None:
    """Reads a spec, measures, and writes the result whole or not at all."""
    spec, result = (Path(argument) for argument in sys.argv[1:3])
    found = measure(json.loads(spec.read_text()))
    temporary = result.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    os.replace(temporary, result)


if __name__ == "__main__":
    settings.clearly(main, AttnPatchError, DataError)
