"""Runs tasks through EleutherAI's lm-eval, without truncation and without counting NaN as an answer."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import EvaluationError, missing_extra
from ..interruption import ensured
from .mode import measuring
from .result import Result
from .task_files import is_file, specified


@dataclass(frozen=True)
class Metric(Result):
    """A figure of a task: its name in lm-eval, the filter of answers, the value and its standard error, where known."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScores(Result):
    """The results of lm-eval.

    Attributes:
        metrics: of every task and group.
        examples: task -> examples measured.
        max_length: tokens that any example was allowed; none was longer.
        version: of lm-eval.
    """

    metrics: tuple[Metric, ...]
    examples: dict[str, int]
    max_length: int
    version: str

    def __str__(self) -> str:
        lines = [f"lm-eval {self.version}, nothing truncated at {self.max_length:,} tokens"]
        for row in self.metrics:
            error = "" if row.stderr is None else f" +- {row.stderr:.4f}"
            count = f" ({self.examples[row.task]:,} examples)" if row.task in self.examples else ""
            name = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
            lines.append(f"  {row.task}  {name}  {row.value:.4f}{error}{count}")
        return "\n".join(lines)


def task_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str | Path],
    *,
    max_length: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch: int = 8,
    seed: int = 1234,
    trust_remote_code: bool = False,
) -> TaskScores:
    """Run tasks of lm-eval on a model object, patched or not.

    lm-eval cuts longer examples on the left, at 2,048 tokens where it finds no other number. Here every example is
    counted first, and one that does not fit is an error.

    Args:
        model: a causal language model of transformers; run in eval mode, put back as it was.
        tokenizer: its tokenizer.
        tasks: names of lm-eval, or YAML files of tasks; ``data_files`` in these are looked up beside the file.
        max_length: tokens of an example and its answer, at most; what the model's config declares unless given.
        limit: first examples of each task only.
        num_fewshot: solved examples before each; the task's own number unless given.
        batch: examples in a forward pass.
        seed: of the choice of solved examples.
        trust_remote_code: whether code that a task file holds or names may run: functions, templates that do more than
            name fields, other files, metrics of the Hub.

    Raises:
        MissingExtra: lm-eval is not installed.
        EvaluationError: no such task, one that would run code, data that are missing, an example that is too long,
            or a figure or logits that are NaN.
    """
    try:
        import lm_eval  # its import takes seconds
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm_eval", "eval", "evaluating tasks") from error
    from .harness_model import WholeExamples

    length = max_length or getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not length or not tasks:
        raise EvaluationError(
            f"max_length={length}, tasks={list(tasks)}; give a number of tokens and at least one task."
        )
    manager = TaskManager(include_defaults=not all(map(is_file, tasks)))
    settings = {"limit": limit, "num_fewshot": num_fewshot, "fewshot_random_seed": seed, "log_samples": False}
    chosen = [specified(task, manager.all_tasks, trusted=trust_remote_code) for task in tasks]
    with measuring(model), _same_random_state(model), _explained(tasks):
        asked = WholeExamples(model, tokenizer, length, batch)
        found = lm_eval.simple_evaluate(model=asked, tasks=chosen, task_manager=manager, **settings)
    return _scores(found, length, version("lm-eval"))


@contextlib.contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    """Restore the random generators of the process, all of which lm-eval seeds."""
    before = random.getstate(), np.random.get_state()

    def put_back() -> None:
        random.setstate(before[0])
        np.random.set_state(before[1])

    devices = {p.device.index for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ensured(put_back), torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def _explained(tasks: Sequence[str | Path]) -> Iterator[None]:
    """Name the tasks in an error that their data or settings caused."""
    try:
        yield
    except EvaluationError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        names, problem = ", ".join(map(str, tasks)), " ".join(str(error).split())[:400]
        raise EvaluationError(
            f"tasks {names}: {type(error).__name__}: {problem}; look at the task's data and settings (a task of "
            "lm-eval's own downloads its data the first time)."
        ) from error


def _scores(found: dict[str, Any], length: int, release: str) -> TaskScores:
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric, _, kept = name.partition(",")
            if not kept or metric.endswith("_stderr") or isinstance(value, str):
                continue
            if math.isnan(float(value)):
                raise EvaluationError(f"task {task}: its {metric} is NaN; look at its data and the model's logits.")
            error = values.get(f"{metric}_stderr,{kept}")
            rows.append(Metric(task, metric, kept, float(value), error if isinstance(error, float) else None))
    counts = {task: int(samples["effective"]) for task, samples in found.get("n-samples", {}).items()}
    if not rows:
        raise EvaluationError(f"tasks {', '.join(found['results'])}: lm-eval reported no metric; look at metric_list.")
    return TaskScores(tuple(rows), counts, length, release)
