"""Runs one cell: loads a model, patches it, trains it if the cell says so, measures it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.patch import from_spec
from recipes import checkpoints, settings
from recipes.comparison.cells import Cell
from recipes.comparison.running import CellFailed
from recipes.comparison.store import Store, environment
from recipes.data import DataConfig, DataError, load_blocks
from recipes.loop import next_token_loss, train
from recipes.positions import measure as measuring
from recipes.positions.study import STRENGTH
from recipes.schedule import TrainConfig
from recipes.skipping import check_model
from recipes.sources import load_model, load_tokenizer, resolve


@dataclass
class Runner:
    """Runs cells in this process, one after another.

    Attributes:
        store: where results go.
        scratch: folder of trainings and their checkpoints; a finished cell's is removed.
        threads: of this process.
    """

    store: Store
    scratch: Path
    threads: int

    def ready(self, cell: Cell) -> Cell:
        """No cell waits for another."""
        return cell

    def run(self, cell: Cell) -> Mapping[str, Any]:
        """Measures a cell and keeps the result.

        Raises:
            CellFailed: a text, a model or a setting is missing.
        """
        torch.set_num_threads(self.threads)
        wall, cpu, where = time.perf_counter(), time.process_time(), environment(self.threads)
        folder = self.scratch / cell.digest
        try:
            found = measured(cell.spec, folder)
        except (DataError, OSError, settings.SettingsError, AttnPatchError) as error:
            raise CellFailed(f"{cell.name}: {error}") from error
        took = {"total_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self.store.add(cell, {**found, **{key: round(value, 1) for key, value in took.items()}}, where)
        shutil.rmtree(folder, ignore_errors=True)
        return self.store.rows[cell.name]


def measured(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What is found of a cell: see `measure.measure`; `refused` where a patch does not fit the model.

    Args:
        spec: of a `Cell` of a study.
        folder: of its training.
    """
    tokenizer = load_tokenizer(spec["model"])
    texts = measuring.read_documents(spec["measure"], tokenizer)
    model = load_model(spec["model"], "float32")
    found: dict[str, Any] = {"documents": len(texts)}
    try:
        for patch in spec["patches"]:
            ap.apply(model, from_spec(patch))
    except AttnPatchError as error:
        return {**found, "refused": str(error)}
    if "train" in spec:
        found["training"] = trained(model, tokenizer, spec, folder)
    found |= measuring.measure(model, tokenizer, texts, spec["measure"])
    if spec["baseline"]:
        found["baselines"] = measuring.baselines(model, texts, spec["measure"])
    return found


def trained(model: PreTrainedModel, tokenizer: Any, spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains all parameters, from the last checkpoint where there is one.

    Returns:
        `tokens`, and `curve`: pairs of tokens and the loss since the pair before.
    """
    values = json.loads(json.dumps(spec["train"])) | {"output": str(folder)}
    config = settings.build(TrainConfig, values, "train")
    blocks = load_blocks(resolve(settings.build(DataConfig, dict(spec["data"]), "data")), tokenizer)
    check_model(model, spec["data"]["skip_to"])
    schedule = strength_schedule(model, spec[STRENGTH], config.steps)
    log = train(
        model,
        blocks,
        next_token_loss,
        replace(config, save_every=config.save_every or config.steps),
        resume=bool(checkpoints.complete(folder / "checkpoints")),
        also={"cell": spec},
        before_step=schedule,
    )
    schedule(config.steps)
    model.eval()
    return {"tokens": log[-1]["tokens"], "curve": [[record["tokens"], round(record["loss"], 4)] for record in log]}


def strength_schedule(model: PreTrainedModel, share: float, steps: int) -> Callable[[int], None]:
    """Raises the slopes of ALiBi linearly from 0 over a share of the steps; does nothing where the share is 0."""
    return partial(_strengthen, model, share * steps) if share else lambda _: None


def _strengthen(model: PreTrainedModel, over: float, step: int) -> None:
    ap.set_alibi_strength(model, min(1.0, step / over))
