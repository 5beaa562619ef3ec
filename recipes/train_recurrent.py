"""What does a memory of earlier segments give, before and after a short fine-tune?

    python recipes/train_recurrent.py --config recipes/configs/train_recurrent_embedded.yaml

With `patches`, such as `{patch: relative_xl}`, the model gets those first. For each number of segments in memory: the
loss of held-out documents by recurrence, a fine-tune on documents that are read in order (row r goes on where it
stopped), the loss again, and how far back context is of use. Writes to `train.output`: metrics.json, and for each
memory a folder with log.jsonl, checkpoints/ and model/. `--resume` goes on; what was measured is measured again, what
was trained is not trained again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import Score, difference
from hf_attnpatch.evaluation.recurrence import recurrence
from recipes import settings
from recipes.checkpoints import ResumeError
from recipes.data import DataConfig, DataError
from recipes.effective_context import effective_context, losses_under
from recipes.job import HeldoutConfig
from recipes.lanes import IGNORED, Lanes, keep_memories, load_lanes, tokenised
from recipes.loop import Batch, Loss, new_accelerator, train
from recipes.schedule import TrainConfig
from recipes.settings import SettingsError
from recipes.sources import load_model, load_tokenizer, resolve

KEYS = {"model", "patches", "recurrence", "data", "heldout", "context", "train"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
    """Segments of `segment_length` tokens, and how many before each are in memory: one training for each number.

    `num_sinks` first tokens of a text stay in it besides.
    """

    segment_length: int = 128
    memory_segments: tuple[int, ...] = (0, 1, 3)
    num_sinks: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Contexts in tokens, and how many targets of each document, for the effective context."""

    lengths: tuple[int, ...]
    targets: int = 128


def recurrent_loss(*streams: ap.Stream) -> Loss:
    """Cross-entropy of rows that go on from batch to batch; `labels` are the next tokens.

    Args:
        streams: the memory of each pass that a batch is accumulated over, in their order.
    """
    passes = itertools.cycle(streams)

    def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        stream = next(passes)
        stream.reset(batch["reset"])
        with stream:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"]
        total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return total, (labels != IGNORED).sum()

    return loss


def fine_tune(
    model: PreTrainedModel,
    lanes: Lanes,
    config: TrainConfig,
    accelerator: Accelerator,
    resume: bool,
    also: dict[str, Any],
) -> list[dict[str, float]]:
    """Trains a patched model in place; the memory is part of its checkpoints.

    The passes that a batch is accumulated over are of other rows each, the same ones at every step, so that each has a
    memory of its own.
    """
    streams = [ap.stream(model) for _ in range(config.accumulation)]
    keep_memories(accelerator, streams)
    return train(model, lanes, recurrent_loss(*streams), config, accelerator=accelerator, resume=resume, also=also)


def one(values: dict[str, Any], memory: int, resume: bool) -> dict[str, Any]:
    """Measures, trains and measures one model; returns its scores, log and losses by context."""
    recurrent = settings.build(RecurrenceConfig, values["recurrence"], "recurrence")
    config = settings.build(TrainConfig, values["train"], "train")
    config = dataclasses.replace(config, output=f"{config.output}/memory_{memory}")
    heldout = settings.build(HeldoutConfig, values["heldout"], "heldout")
    context = settings.build(ContextConfig, values["context"], "context")
    accelerator = new_accelerator(config)
    with accelerator.main_process_first():
        tokenizer = load_tokenizer(values["model"])
        data = resolve(settings.build(DataConfig, values["data"], "data"))
        lanes = load_lanes(data, tokenizer, config.batch_size, config.seed)
        texts = list(tokenised(resolve(heldout), tokenizer, heldout.documents))
    model = load_model(values["model"], "float32")
    patches = [ap.from_spec(spec) for spec in values.get("patches", ())]
    if patches:
        ap.apply(model, *patches)
    length = recurrent.segment_length
    sizes = {"segment_length": length, "memory_length": memory * length, "num_sinks": recurrent.num_sinks}
    ap.patch_segment_recurrence(model, **sizes)
    before = recurrence(model, ap.stream(model), texts)
    folder = Path(config.output)
    again = resume and any((folder / "checkpoints").glob("step_*"))
    log = fine_tune(model, lanes, config, accelerator, again, {"memory": memory, "model": values["model"]})
    accelerator.free_memory()
    after = recurrence(model, ap.stream(model), texts)
    if accelerator.is_main_process:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    contexts = losses_under(model, texts, list(context.lengths), context.targets)
    return {"before": before, "after": after, "log": log, "contexts": contexts}


def summary(found: dict[int, dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """The figures of all memories: losses, paired differences from the first one, effective contexts."""
    first = next(iter(found))
    rows = {}
    for memory, run in found.items():
        stages = {stage: _short(run[stage]) for stage in ("before", "after")}
        gains = {f"{stage}_less_none": _interval(found[first][stage], run[stage]) for stage in ("before", "after")}
        trained = {"after_less_before": _interval(run["before"], run["after"])}
        by_context = {str(c): float(losses.mean()) for c, losses in run["contexts"].items()}
        rows[str(memory)] = {**stages, **gains, **trained, "loss_by_context": by_context, "log": run["log"]}
    group = {str(memory): run["contexts"] for memory, run in found.items()}
    reach = {str(share): effective_context(group, share) for share in (0.1, 0.5, 1.0)}
    return {"settings": values, "memory_segments": rows, "effective_context": reach}


def _short(score: Score) -> dict[str, float]:
    return {"nats": score.nats, "low": score.low, "high": score.high, "tokens": score.tokens}


def _interval(before: Score, after: Score) -> dict[str, float]:
    return dataclasses.asdict(difference(before, after))


def main() -> None:
    """Reads the configuration, runs every memory and prints the losses."""
    arguments = settings.parser(__doc__).parse_args()
    values = settings.read(arguments.config, arguments.overrides)
    if set(values) - KEYS:
        raise SettingsError(
            f"{arguments.config}: unknown {', '.join(sorted(set(values) - KEYS))}; choose from {sorted(KEYS)}."
        )
    recurrent = settings.build(RecurrenceConfig, values["recurrence"], "recurrence")
    found = {memory: one(values, memory, arguments.resume) for memory in recurrent.memory_segments}
    metrics = {"config": Path(arguments.config).name, **summary(found, values)}
    if Accelerator().is_main_process:
        path = Path(values["train"]["output"]) / "metrics.json"
        path.write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
        for memory, row in metrics["memory_segments"].items():
            print(
                f"{memory} segments in memory: {row['before']['nats']:.4f} -> {row['after']['nats']:.4f} nats per token"
            )
        print(f"effective context: {metrics['effective_context']}; wrote {path}")


if __name__ == "__main__":
    settings.clearly(main, AttnPatchError, SettingsError, DataError, ResumeError)
