"""A running uptraining: its job, its measurements, and the file with both."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch import Patch
from hf_attnpatch.evaluation import Score, cache_bytes_per_token, difference, summarise
from recipes import figures
from recipes import job as jobs
from recipes.calibration import Calibration
from recipes.data import Blocks
from recipes.evaluate import Window, score
from recipes.job import Job


@dataclass
class Run:
    """A running uptraining.

    Args:
        job: what to do.
        accelerator: on which processes and devices.
        tokenizer: of the model.
        blocks: text to train on.
        windows: text to measure on.
        calibration: text that patches are fitted on.
    """

    job: Job
    accelerator: Accelerator
    tokenizer: Any
    blocks: Blocks
    windows: list[Window]
    calibration: Calibration | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    caches: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share beside `train` and the data."""
        found = None if self.calibration is None else self.calibration.identity()
        return {**self.job.identity(), "calibration": found}

    def patches(self) -> Sequence[Patch]:
        """The patches to apply, with the text that some of them are fitted on."""
        return self.job.patches if self.calibration is None else self.calibration.give(self.job.patches)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the duration of a block to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def measure(self, stage: str, model: PreTrainedModel) -> None:
        """Scores a stage on the held-out text; every process takes its share."""
        with self.clock("evaluate"):
            self.scores[stage] = score(self.accelerator, model, self.windows, self.job.heldout.batch, f"{stage} loss")
            self.caches[stage] = cache_bytes_per_token(model)
        self.say(f"{stage}: {self.scores[stage].nats:.4f} nats per token")

    def say(self, text: str) -> None:
        """Prints a line, on one process."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def during(self) -> list[Window]:
        """The windows that are measured during training: those of a few documents, spread evenly."""
        documents = sorted({window["document"] for window in self.windows})
        count = min(self.job.heldout.during, len(documents))
        chosen = {documents[position * len(documents) // count] for position in range(count)}
        return [window for window in self.windows if window["document"] in chosen]

    def level(self, stage: str, documents: Collection[Hashable]) -> float:
        """The loss of a stage on some of the documents, in nats per token."""
        losses = self.scores[stage].losses
        return summarise({document: losses[document] for document in documents}, resamples=1).nats

    def summary(self, stage: str) -> dict[str, float]:
        """A stage's score as JSON-able data."""
        found = self.scores[stage]
        values = {key: getattr(found, key) for key in ("nats", "low", "high", "perplexity", "tokens")}
        return {**values, "documents": len(found.losses), "cache_bytes_per_token": self.caches[stage]}


def share_cores(job: Job, accelerator: Accelerator) -> None:
    """Sets the threads of a process on CPU: `job.threads`, or its share of the cores that this process may use."""
    if accelerator.device.type != "cpu":
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    torch.set_num_threads(job.threads or max(1, cores // here))


def write(run: Run, found: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Writes metrics.json and the figures.

    Args:
        run: finished.
        found: what else belongs into the metrics.
        log: of the training.

    Returns:
        The metrics.
    """
    job = run.job
    names = {"metrics": "metrics.json", "loss curve": "loss.png", "comparison": "comparison.png", "model": "model"}
    files = {name: str(job.output / path) for name, path in names.items()}
    original = run.scores["original"]
    metrics = {
        "job": jobs.plain(job),
        "scores": {stage: run.summary(stage) for stage in run.scores},
        "differences": {
            stage: dataclasses.asdict(difference(original, run.scores[stage])) for stage in ("converted", "uptrained")
        },
        **found,
        "seconds": {name: round(value, 2) for name, value in run.seconds.items()},
        "machine": machine(run.accelerator),
        "files": files,
    }
    followed = {window["document"] for window in run.during()}
    levels = {stage: run.level(stage, followed) for stage in run.scores}
    text = f"{len(followed)} of {len(original.losses)} held-out documents"
    figures.loss_curve(log, levels, Path(files["loss curve"]), loss=job.loss, text=text)
    figures.comparison(metrics["scores"], metrics["differences"], Path(files["comparison"]))
    temporary = job.output / ".tmp-metrics.json"
    temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    os.replace(temporary, files["metrics"])
    return metrics


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What the run ran on."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "hf_attnpatch": ap.__version__}
    counts = {"processes": accelerator.num_processes, "threads": torch.get_num_threads()}
    return {"device": accelerator.device.type, **counts, **versions}
