"""A tiny training run in a process of its own, so that it can be killed or be one of two.

python worker.py OUTPUT '{"steps": 6, ...}' [--resume] [--kill-step N] [--kill-in-save N]
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes import checkpoints, loop
from recipes.schedule import TrainConfig


class Rows:
    """Random rows whose labels count unevenly: row i has between 2 and 15 of 16 labels."""

    fingerprint = "rows"

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 50, (count, 16), generator=generator)
        self.kept = torch.randint(2, 16, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[int(self.kept[index]) :] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def tiny(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **drop))


def settings(output: object, **changes: object) -> TrainConfig:
    values = {"steps": 6, "batch_size": 8, "lr": 1e-2, "warmup": 2, "log_every": 1} | changes
    return TrainConfig(output=str(output), **values)


def killed_at(step: int, accumulation: int) -> loop.Loss:
    passes = 0

    def loss(model, batch):
        nonlocal passes
        if passes == step * accumulation:
            os.kill(os.getpid(), signal.SIGKILL)
        passes += 1
        return loop.next_token_loss(model, batch)

    return loss


def kill_in_save(number: int) -> None:
    """The `number`-th save dies after its files are written and before the folder gets its name."""
    saves = 0
    real = checkpoints.sync

    def sync(path: Path) -> None:
        nonlocal saves
        if path.name.startswith(".tmp-"):
            saves += 1
            if saves == number:
                os.truncate(path / "model.safetensors", 100)  # what a lost cache would leave
                os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    checkpoints.sync = sync


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-step", type=int)
    parser.add_argument("--kill-in-save", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = settings(arguments.output, **arguments.settings)
    if arguments.kill_in_save:
        kill_in_save(arguments.kill_in_save)
    loss = loop.next_token_loss
    if arguments.kill_step is not None:
        loss = killed_at(arguments.kill_step, config.accumulation)
    accelerator = loop.new_accelerator(config)
    model = tiny(arguments.dropout)
    log = loop.train(model, Rows(), loss, config, accelerator=accelerator, resume=arguments.resume)
    if accelerator.is_main_process:
        state = {"log": log, "model": model.state_dict(), "processes": accelerator.num_processes}
        torch.save(state, Path(arguments.output) / "result.pt")
