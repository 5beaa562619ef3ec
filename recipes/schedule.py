"""What a training run is, as data: its settings, and learning rate and data order as functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from recipes.settings import at_least


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        output: folder of the log, the checkpoints and the trackers.
        steps: optimizer steps.
        batch_size: examples per optimizer step, over all processes and accumulated passes together.
        accumulation: forward and backward passes per optimizer step and process.
        lr: peak learning rate of AdamW.
        min_lr: the last learning rate as a share of `lr`.
        warmup: steps of linear warm-up.
        schedule: what follows the warm-up.
        weight_decay: on matrices; vectors (norms, biases) get none.
        betas: of AdamW.
        grad_clip: largest norm of the gradient.
        seed: of the data order and of dropout.
        mixed_precision: `bf16` runs the forward under autocast; weights and optimizer stay as they are.
        gradient_checkpointing: recomputes activations in the backward.
        log_every: steps between log lines.
        eval_every: steps between calls of `evaluate`; 0 for never.
        save_every: steps between checkpoints; 0 for none.
        keep: how many checkpoints stay.
        trackers: names for Accelerate's `log_with`, such as `tensorboard`.
    """

    output: str
    steps: int
    batch_size: int
    accumulation: int = 1
    lr: float = 1e-3
    min_lr: float = 0.05
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        once = {"steps": self.steps, "batch_size": self.batch_size, "accumulation": self.accumulation}
        at_least(1, "train", **once, log_every=self.log_every, keep=self.keep)
        at_least(0, "train", warmup=self.warmup, eval_every=self.eval_every, save_every=self.save_every)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.min_lr + (1 - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def indices(config: TrainConfig, length: int, step: int) -> list[int]:
    """The examples of optimizer step `step`, in order: a new permutation every epoch, without state."""
    chosen: list[int] = []
    first = step * config.batch_size
    permutations: dict[int, torch.Tensor] = {}
    for position in range(first, first + config.batch_size):
        epoch = position // length
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            permutations[epoch] = torch.randperm(length, generator=generator)
        chosen.append(int(permutations[epoch][position % length]))
    return chosen


def order(config: TrainConfig, data: Any, step: int) -> list[int]:
    """The examples of a step: data whose rows continue from batch to batch (`lanes.Lanes`) decides itself."""
    own = getattr(data, "order", None)
    return indices(config, len(data), step) if own is None else list(own(step))
