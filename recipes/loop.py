"""The one training loop. It knows models, data and losses, and nothing of patches.

* The loss of an optimizer step is the sum of all its losses over the number of all its tokens, whatever the number of
  processes and of accumulated passes: `loss` returns a sum and a count, gradients are scaled once the count is known.
* Data order and learning rate are functions of (seed, step); with the random states in a checkpoint, a resumed run is
  bit-equal to one that was never interrupted.
* `batch_size` is the number of blocks per optimizer step over all processes, so the same settings on more processes
  are the same training.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import MofNCompleteColumn, TaskID
from rich.progress import Progress as Bar
from torch import nn

from recipes import checkpoints
from recipes.checkpoints import Progress, ResumeError
from recipes.log import Log, check_loss
from recipes.schedule import TrainConfig, learning_rate, order

Batch = dict[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
Evaluate = Callable[[nn.Module], dict[str, float]]


class Dataset(Protocol):
    """Indexed examples of one shape, such as `data.Blocks`."""

    def __len__(self) -> int: ...  # noqa: D105
    def __getitem__(self, index: int, /) -> Batch: ...  # noqa: D105


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token.

    Args:
        model: returns `.logits` of shape (batch, length, vocabulary).
        batch: `input_ids` and `labels`, each (batch, length); labels of -100 do not count.

    Returns:
        The sum of the losses in nats (float32, scalar) and the number of tokens they are of (int64, scalar).
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # batch, length - 1, vocabulary
    labels = batch["labels"][:, 1:]  # batch, length - 1
    total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total, (labels != -100).sum()


def batches(config: TrainConfig, data: Dataset, step: int, accelerator: Accelerator) -> list[Batch]:
    """This process's share of optimizer step `step`, as the passes it is accumulated over."""
    chosen = order(config, data, step)[accelerator.process_index :: accelerator.num_processes]
    size = len(chosen) // config.accumulation
    examples = [data[index] for index in chosen]
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [{k: torch.stack([each[k] for each in part]).to(accelerator.device) for k in part[0]} for part in parts]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient, with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trained if each.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [each for each in trained if each.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=True)


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Batch],
    loss: Loss,
    config: TrainConfig,
) -> tuple[float, int]:
    """One step: accumulates, divides by the tokens of the whole global batch, clips, updates.

    Gradients are summed with the constant factor 1 / batch_size, which keeps them small; once every process's count is
    known they are multiplied so that the factor becomes 1 / tokens. Data parallelism averages over processes, hence
    the number of processes in it.

    Returns:
        The sum of the losses over all processes in nats, and the number of tokens.

    Raises:
        ValueError: no token in the whole batch counts; ``LossError`` where the loss is not finite.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for number, part in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            total, count = loss(model, part)
            accelerator.backward(total / config.batch_size)
        sums += torch.stack([total.detach().double(), count.double()])
    value, tokens = check_loss(accelerator.reduce(sums, reduction="sum").tolist())
    if tokens == 0:
        raise ValueError("a whole batch without a token to learn from: every label is -100; check the data's labels.")
    parameters = [each for each in model.parameters() if each.grad is not None]
    for parameter in parameters:
        parameter.grad.mul_(config.batch_size * accelerator.num_processes / tokens)  # type: ignore[union-attr]
    accelerator.clip_grad_norm_(parameters, config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return value, int(tokens)


def check(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuses settings that cannot mean what they say.

    Raises:
        ValueError: the batch does not divide over processes and passes.
    """
    shares = accelerator.num_processes * config.accumulation
    if config.batch_size % shares:
        raise ValueError(
            f"train.batch_size {config.batch_size} does not divide over {accelerator.num_processes} processes times "
            f"{config.accumulation} accumulated passes; choose a multiple of {shares}."
        )


def train(
    model: nn.Module,
    data: Dataset,
    loss: Loss,
    config: TrainConfig,
    *,
    accelerator: Accelerator | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    also: Mapping[str, Any] | None = None,
    before_step: Callable[[int], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Trains `model` in place.

    Args:
        model: anything `loss` understands; patched before it comes here.
        data: examples by index.
        loss: `loss(model, batch) -> (sum of losses, number of tokens)`.
        config: how.
        accelerator: to use instead of one made from `config`.
        evaluate: called every `eval_every` steps in eval mode without gradients; what it returns is logged.
        resume: goes on from the newest checkpoint in `config.output`.
        also: further settings that a resumed run must share with the run it resumes, JSON-able.
        before_step: called before each optimizer step with its number from 0: a schedule of more than learning rates.

    Returns:
        The log: one record a line of `log.jsonl` with step, loss (nats a token, mean since the line before), lr, tokens
        and seconds.

    Raises:
        ValueError: the batch does not divide over processes and passes.
        ResumeError: `resume` is impossible, or unasked for and the folder holds checkpoints already.
    """
    accelerator = accelerator or new_accelerator(config)
    check(config, accelerator)
    folder = Path(config.output) / "checkpoints"
    prepare_folder(accelerator, folder, resume)
    if config.gradient_checkpointing:
        recompute(model)
    set_seed(config.seed, device_specific=True)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    settings = identity(config, data, also)
    progress = checkpoints.restore(accelerator, folder, settings) if resume else Progress()
    log = Log(accelerator, config.output, progress.step, asdict(config), config.trackers)
    run(accelerator, prepared, optimizer, data, loss, config, progress, log, evaluate, settings, before_step)
    log.close()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # takes autocast off the caller's model again
    return log.records


def run(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    loss: Loss,
    config: TrainConfig,
    progress: Progress,
    log: Log,
    evaluate: Evaluate | None,
    settings: dict[str, Any],
    before_step: Callable[[int], None],
) -> None:
    """The loop itself: from `progress` to `config.steps`, on a prepared model and optimizer."""
    bar, task = progress_bar(accelerator, config.steps, progress.step)
    model.train()
    while progress.step < config.steps:
        started = time.perf_counter()
        before_step(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress.step)
        parts = batches(config, data, progress.step, accelerator)
        value, tokens = optimizer_step(accelerator, model, optimizer, parts, loss, config)
        progress = progress.after(value, tokens, time.perf_counter() - started)
        bar.update(task, advance=1)
        last = progress.step == config.steps
        evaluated = evaluate is not None and due(config.eval_every, progress.step, last)
        if evaluated or due(config.log_every, progress.step, last):
            log.write(record(config, progress) | (measured(model, evaluate) if evaluate and evaluated else {}))
            bar.update(task, description=f"loss {log.records[-1]['loss']:.4f}")
            progress = replace(progress, window_loss=0.0, window_tokens=0)
        if due(config.save_every, progress.step, last):
            checkpoints.save(accelerator, Path(config.output) / "checkpoints", progress, settings, config.keep)
    bar.stop()


def progress_bar(accelerator: Accelerator, steps: int, done: int) -> tuple[Bar, TaskID]:
    """A started progress bar, shown by one process a machine and only where there is a terminal."""
    bar = Bar(*Bar.get_default_columns(), MofNCompleteColumn())
    bar.disable = not (bar.console.is_terminal and accelerator.is_local_main_process)
    bar.start()
    return bar, bar.add_task("training", total=steps, completed=done)


def new_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator that `config` describes.

    Raises:
        RuntimeError: a launcher started several processes and Accelerate did not join them.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or Accelerate runs every process alone, without a word
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_dir=config.output,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"the launcher started {launched} processes, Accelerate joined {accelerator.num_processes}; make the "
            "accelerator with loop.new_accelerator before anything else asks Accelerate for its state."
        )
    return accelerator


def recompute(model: Any) -> None:
    """Turns gradient checkpointing on, under the name that this version of transformers gives it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def prepare_folder(accelerator: Accelerator, folder: Path, resume: bool) -> None:
    """Makes the folder of checkpoints, without what a killed run left unfinished.

    Raises:
        ResumeError: it holds checkpoints and nobody asked to resume.
    """
    if not resume and checkpoints.complete(folder):
        raise ResumeError(f"{folder} holds checkpoints; pass --resume to go on, or choose another train.output.")
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.clean(folder)
    accelerator.wait_for_everyone()


def identity(config: TrainConfig, data: Dataset, also: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must not change between a run and its resumption, as JSON gives it back; `steps` may be cut or extended."""
    free = ("output", "steps", "log_every", "eval_every", "save_every", "keep", "trackers")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    settings |= {"examples": len(data), "data": getattr(data, "fingerprint", None), **(also or {})}
    return dict(json.loads(json.dumps(settings)))


def record(config: TrainConfig, progress: Progress) -> dict[str, float]:
    """The log's line: the loss is the mean over the tokens since the line before."""
    return {
        "step": progress.step,
        "loss": progress.window_loss / progress.window_tokens,
        "lr": learning_rate(config, progress.step - 1),
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 2),
    }


def due(every: int, step: int, last: bool) -> bool:
    """Whether something done `every` steps (0: never) and at the end is due."""
    return every > 0 and (last or step % every == 0)


def measured(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Calls `evaluate` in eval mode without gradients and returns to training."""
    model.eval()
    with torch.no_grad():
        values = evaluate(model)
    model.train()
    return values
