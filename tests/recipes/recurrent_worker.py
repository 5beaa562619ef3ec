"""A tiny recurrent training in a process of its own, so that it can be killed or be one of two.

python recurrent_worker.py OUTPUT '{"steps": 6, ...}' [--resume] [--kill-step N]
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_attnpatch as ap
from recipes import loop
from recipes.lanes import Lanes
from recipes.schedule import TrainConfig
from recipes.train_recurrent import fine_tune

LENGTHS = (40, 9, 23, 61, 17, 30)


def lanes() -> Lanes:
    generator = torch.Generator().manual_seed(1)
    return Lanes([torch.randint(5, 50, (n,), generator=generator) for n in LENGTHS], rows=4, block=8)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    ap.patch_segment_recurrence(made, segment_length=4, memory_length=8)
    return made


def run(output: object, changes: dict, resume: bool = False, kill: int | None = None) -> tuple:
    values = {"steps": 8, "batch_size": 4, "lr": 1e-2, "log_every": 1} | changes
    config = TrainConfig(output=str(output), **values)
    accelerator, made, data = loop.new_accelerator(config), model(), lanes()
    if kill is not None:
        plain, calls = data.order, []
        data.order = lambda step: (
            calls.append(step) or (os.kill(os.getpid(), signal.SIGKILL) if step == kill else plain(step))
        )
    log = fine_tune(made, data, config, accelerator, resume, {})
    return log, made, accelerator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("changes", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-step", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log, made, accelerator = run(arguments.output, arguments.changes, arguments.resume, arguments.kill_step)
    if accelerator.is_main_process:
        found = {"log": log, "model": made.state_dict(), "processes": accelerator.num_processes}
        torch.save(found, Path(arguments.output) / "result.pt")


if __name__ == "__main__":
    main()
