"""Runs cells, each in its own process, and stores their results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes import checkpoints
from recipes.comparison.cells import Cell
from recipes.comparison.running import CellFailed
from recipes.comparison.store import environment
from recipes.grouped_query.cells import RATES, TRIED
from recipes.grouped_query.store import Store

RECIPES = Path(__file__).resolve().parents[1]
CONFIG = RECIPES / "configs/grouped_query_refined.yaml"
FIGURES = {"embedded/8-2/refined": "damage_embedded.png", "smollm2/3-1/refined": "damage_smollm2.png"}


@dataclass(frozen=True)
class Runner:
    """Runs cells.

    Attributes:
        store: where results go.
        scratch: folder of uptraining runs and their checkpoints.
        threads: of a cell's process.
    """

    store: Store
    scratch: Path
    threads: int

    def ready(self, cell: Cell) -> Cell:
        """The cell with its learning rate chosen, if it waits for one and the trials are there."""
        if cell.kind != "uptrain" or cell.spec["lr"] is not None:
            return cell
        return cell.with_(lr=self.rate(cell.spec["method"]))

    def rate(self, start: str) -> float | None:
        """The learning rate whose trial lost least; None while there is no trial."""
        tried = TRIED[start]
        rows = {rate: self.store.get(f"uptraining/rates/8-2/{tried}/{rate:g}") for rate in RATES[tried]}
        found = {rate: row["scores"]["uptrained"]["nats"] for rate, row in rows.items() if row is not None}
        return min(found, key=found.__getitem__) if found else None

    def run(self, cell: Cell) -> Mapping[str, Any]:
        """Measures a cell and keeps the result.

        Raises:
            CellFailed: its process ended with an error.
        """
        started, where = time.perf_counter(), environment(self.threads)
        found = self._uptrain(cell) if cell.kind == "uptrain" else self._convert(cell)
        self.store.add(cell, {**found, "total_seconds": round(time.perf_counter() - started, 1)}, where)
        return self.store.rows[cell.name]

    def _convert(self, cell: Cell) -> dict[str, Any]:
        spec = {**cell.spec, "threads": self.threads}
        if cell.name in FIGURES:
            spec["figure"] = str(self.store.path.parent / FIGURES[cell.name])
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("spec.json", "result.json")]
            paths[0].write_text(json.dumps(spec))
            self._launch(cell, ["-m", "recipes.grouped_query.worker", *map(str, paths)])
            return dict(json.loads(paths[1].read_text()))

    def _uptrain(self, cell: Cell) -> dict[str, Any]:
        if cell.spec["lr"] is None:
            raise CellFailed(f"{cell.name}: no learning rate; run --cells 'uptraining/rates/*' first")
        folder = self.scratch / f"{cell.name.replace('/', '_')}-{cell.digest}"
        metrics = folder / "metrics.json"
        if not metrics.is_file():
            resume = ["--resume"] if checkpoints.complete(folder / "checkpoints") else []
            flags = [flag for setting in overrides(cell.spec, folder, self.threads) for flag in ("--set", setting)]
            self._launch(cell, [str(RECIPES / "uptrain.py"), "--config", str(CONFIG), *flags, *resume])
        found = json.loads(metrics.read_text())
        for done in ("checkpoints", "model"):
            shutil.rmtree(folder / done, ignore_errors=True)  # the figures are kept; weights would fill the disk
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        keys = ("step", "tokens", "loss", "heldout_loss")
        curve = [{key: row[key] for key in keys} for row in log if "heldout_loss" in row]
        return {
            **{key: found[key] for key in ("scores", "differences", "seconds")},
            "trained_tokens": found["training"]["tokens"],
            "trainable_parameters": found["training"]["trainable_parameters"],
            "curve": curve,
        }

    def _launch(self, cell: Cell, command: list[str]) -> None:
        variables = {
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        variables["PYTHONPATH"] = os.pathsep.join([str(RECIPES.parent), *os.environ.get("PYTHONPATH", "").split()])
        done = subprocess.run([sys.executable, *command], env={**os.environ, **variables}, check=False)
        if done.returncode:
            raise CellFailed(f"{cell.name}: ended with exit code {done.returncode}; its message is above")


def overrides(spec: Mapping[str, Any], output: Path, threads: int) -> list[str]:
    """The settings of an uptraining cell as `uptrain.py --set` takes them."""
    patch = {"patch": "grouped_query", "num_kv_heads": spec["num_kv_heads"], "method": spec["method"]}
    fitted = spec["method"] in ("calibrated", "refined")
    if fitted:
        patch["refine_steps"] = spec["refine_steps"]
    heldout = {
        "source": spec["heldout"],
        "block": spec["data"]["block"],
        "windows": spec["windows"],
        "documents": spec["documents"],
        "batch": 8 if spec["model"] == "embedded" else 2,
        "during": 1000,
    }
    values = {
        "model": spec["model"],
        "loss": spec["loss"],
        "patches": [patch],
        "calibration": spec["calibration"] if fitted else None,
        "data": {"cache": "data/cache", **spec["data"]},
        "heldout": heldout,
        "threads": threads,
        "train.output": str(output),
        "train.steps": spec["steps"],
        "train.batch_size": spec["batch_size"],
        "train.lr": spec["lr"],
        "train.eval_every": spec["eval_every"],
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
