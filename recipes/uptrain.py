"""How much of a patch's damage does a little training repair? Patches, uptrains and measures a model at every stage.

    accelerate launch recipes/uptrain.py --config recipes/configs/grouped_query_tiny.yaml

On several processes with CPUs: `torchrun --nproc_per_node 2 recipes/uptrain.py --config ...` (`accelerate launch --cpu
--num_processes 2` starts one). Writes to `train.output`: metrics.json, log.jsonl, report.txt (what the patches
changed), damage.json and damage.png (what sharing heads costs each layer, where a patch measured it), loss.png,
comparison.png, checkpoints/ to resume from, and model/, which a new process has loaded again and found equal. With LoRA
also adapter/ and converted/, the model it belongs on.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import mean_loss
from hf_attnpatch.plotting import import_pyplot
from recipes import calibration, saving, settings, sharding, table, trainable
from recipes import job as jobs
from recipes.checkpoints import ResumeError
from recipes.data import DataError, load_blocks
from recipes.distill import Distillation, LayerwiseDistillation
from recipes.evaluate import heldout_windows
from recipes.job import Job
from recipes.log import LossError
from recipes.loop import Batch, Evaluate, Loss, new_accelerator, next_token_loss, prepare_folder, train
from recipes.run import Run, share_cores, write
from recipes.settings import SettingsError
from recipes.skipping import check_model
from recipes.sources import load_model, load_tokenizer, resolve


def start(job: Job, resume: bool) -> Run:
    """Checks processes, folder and data, in the order of what is quickest to get wrong; loads no model.

    Raises:
        SettingsError: the run has not the number of processes that was asked for.
        ResumeError: `resume` is impossible, or was not asked for and there are checkpoints.
        DataError: a text is missing or empty.
    """
    accelerator = new_accelerator(job.train)
    if job.processes not in (None, accelerator.num_processes):
        raise SettingsError(
            f"processes: {job.processes} were asked for, this run has {accelerator.num_processes}. On CPUs start them "
            f"with `torchrun --nproc_per_node {job.processes} recipes/uptrain.py --config ...`; "
            "`accelerate launch --cpu --num_processes N` starts one."
        )
    sharding.check(accelerator)
    share_cores(job, accelerator)
    prepare_folder(accelerator, job.output / "checkpoints", resume)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(job.model)
        blocks = load_blocks(resolve(job.data), tokenizer)
        windows = heldout_windows(job.heldout, tokenizer)
        text = None if job.calibration is None else calibration.load(job.calibration, tokenizer)
    return Run(job, accelerator, tokenizer, blocks, windows, text)


def convert(run: Run, model: PreTrainedModel) -> ap.Report:
    """Applies the patches and records what they changed."""
    with run.clock("convert"):
        report = ap.apply(model, *run.patches())
    if run.accelerator.is_main_process:
        (run.job.output / "report.txt").write_text(f"{report}\n", "utf-8")
        if report.damage is not None:
            (run.job.output / "damage.json").write_text(json.dumps(report.damage.to_dict(), indent=1) + "\n")
            report.damage.save_figure(run.job.output / "damage.png")
    run.say(f"patched: {', '.join(patch.name for patch in run.job.patches)} (see {run.job.output / 'report.txt'})")
    return report


def uptrain(run: Run, model: PreTrainedModel, loss: Loss, resume: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains the patched model.

    Returns:
        The plain trained model, and the figures of the training with its `log`.
    """
    job, base = run.job, run.job.output / "converted"
    if job.trainable == "lora" and run.accelerator.is_main_process:
        saving.save(model, run.tokenizer, base)
    student = trainable.choose(model, job.trainable, job.lora)
    sizes = trainable.sizes(student)
    run.say(f"training {sizes['trainable_parameters']:,} of {sizes['parameters']:,} parameters")
    during, plain = heldout_during(run, student), sharding.blueprint(run.accelerator, student)
    with run.clock("uptrain"):
        options: dict[str, Any] = {"accelerator": run.accelerator, "evaluate": during, "also": run.identity()}
        log = train(student, run.blocks, loss, job.train, resume=resume, **options)
    adapter = job.output / "adapter" if run.accelerator.is_main_process else None
    model = trainable.merge(sharding.gather(student, plain), adapter, str(base))
    last = {"steps": job.train.steps, "tokens": log[-1]["tokens"], "loss": log[-1]["loss"]}
    return model.eval(), {**sizes, **last, "log": log}


def heldout_during(run: Run, student: nn.Module) -> Evaluate:
    """The evaluation for the loop: a few documents, all on every process, on the unwrapped model."""
    chosen = run.during()

    def evaluate(_: nn.Module) -> dict[str, float]:
        return {"heldout_loss": mean_loss(student, chosen, batch=run.job.heldout.batch, resamples=1).nats}

    return evaluate


def choose_loss(run: Run, model: PreTrainedModel) -> Loss:
    """The loss that the job names; those that distil keep a copy of the model as it is now, before the patches."""
    if run.job.loss == "cross_entropy":
        return next_token_loss
    teacher = copy.deepcopy(model)
    if run.job.loss == "distillation":
        return Distillation(teacher, run.accelerator.autocast)
    sites = [site.path for site in ap.describe(model).sites]
    return LayerwiseDistillation(teacher, sites, sample(run), run.accelerator.autocast)


def sample(run: Run, count: int = 8) -> Batch:
    """The first blocks of the training text: the same on every process and in a resumed run."""
    rows = [run.blocks[index] for index in range(min(count, len(run.blocks)))]
    return {key: torch.stack([row[key] for row in rows]).to(run.accelerator.device) for key in rows[0]}


def execute(run: Run, resume: bool) -> dict[str, Any]:
    """Original, converted, uptrained: all stages in order; returns what was found beside the scores."""
    set_seed(run.job.train.seed)
    device = run.accelerator.device
    model = load_model(run.job.model, run.job.dtype).to(device)
    run.measure("original", model)
    loss = choose_loss(run, model)
    report = convert(run, model)
    run.measure("converted", model)
    check_model(model, run.job.data.skip_to)
    model, training = uptrain(run, model, loss, resume)
    run.measure("uptrained", model)
    stock = (report.record or {}).get("stock", report.stock)  # patches that the model had before count too
    reloaded = finish(run, model, stock) if run.accelerator.is_main_process else {}
    return {"training": training, "reload": reloaded, "report": dict(report.checks)}


def finish(run: Run, model: PreTrainedModel, stock: bool) -> dict[str, Any]:
    """Saves the model and loads it again in another process."""
    folder = run.job.output / "model"
    with run.clock("save and reload"):
        saving.save(model, run.tokenizer, folder)
        return saving.check_reload(model, folder, run.windows[0]["input_ids"][None], stock=stock)


def main() -> None:
    """Reads the configuration, runs it and prints the table.

    Raises:
        ReloadError: the saved model is not bit for bit the one in memory.
    """
    arguments = settings.parser(__doc__).parse_args()
    started = time.perf_counter()
    import_pyplot()
    run = start(jobs.read(arguments.config, arguments.overrides), arguments.resume)
    found = execute(run, arguments.resume)
    run.seconds["total"] = time.perf_counter() - started
    if run.accelerator.is_main_process:
        metrics = write(run, found, found["training"].pop("log"))
        table.show(metrics)
        if metrics["reload"]["max_difference"] and metrics["reload"]["attention"] != "default":
            raise saving.ReloadError(f"{metrics['files']['model']}: loaded again, logits differ; see metrics.json.")
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    settings.clearly(main, AttnPatchError, SettingsError, DataError, ResumeError, LossError)
