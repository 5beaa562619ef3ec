"""What does one line do to a model, and what does it cost? The worker of `attnpatch demo`, on the embedded model.

    python recipes/demo.py --config recipes/configs/demo.yaml

Diagnoses the lack, converts to fewer key-value heads in three ways, writes text with each, measures cache, speed and
longer texts, uptrains, saves, loads with stock transformers, and writes to `train.output`: demo.html, one page that
needs nothing else; demo.svg, its picture; metrics.json; log.jsonl; model/. Prints one JSON object a line: the stages
with the seconds that each takes on two idle cores, and which of them begins. All other words go to stderr. `attnpatch
demo` shows it.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_attnpatch as ap
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import difference, loss_by_position
from hf_attnpatch.evaluation.decoding import prefill, step
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.mode import measuring
from hf_attnpatch.writing import write
from recipes import demo_page, settings, uptrain
from recipes import job as jobs
from recipes.checkpoints import ResumeError
from recipes.data import DataError, documents
from recipes.log import LossError
from recipes.run import Run, machine
from recipes.settings import SettingsError
from recipes.sources import load_model, resolve

PROMPTS = {"prose": "KING HENRY.\nMy lord, ", "python": "class Stack:\n    def push(self, item):\n"}
DATA_FREE = {"mean": "averaged", "principal": "principal"}  # method -> how the page calls it
STRETCHED = {"yarn": ap.RopeScaling(kind="yarn", factor=4.0), "self_extend": ap.SelfExtend(target_length=2048)}


@dataclass(frozen=True, kw_only=True)
class Show:
    """How much the demo measures.

    Args:
        context: tokens of a text, in the diagnosis.
        texts: that are served at once, in the diagnosis.
        hardware: that they are served on; see `attnpatch diagnose`.
        speed_context: tokens in the cache where decoding is timed.
        speed_batch: sequences there.
        speed_tokens: further tokens that are timed.
        long: tokens of the documents that are longer than what the model was trained at.
        long_documents: how many of them.
        long_bins: into which their positions are divided.
        written: tokens of each text that is written.
    """

    context: int = 4096
    texts: int = 16
    hardware: str = "h100"
    speed_context: int = 2048
    speed_batch: int = 8
    speed_tokens: int = 12
    long: int = 2048
    long_documents: int = 6
    long_bins: int = 8
    written: int = 60

    section: ClassVar[str] = "show"

    def __post_init__(self) -> None:
        counts = {key: value for key, value in asdict(self).items() if isinstance(value, int)}
        settings.at_least(1, self.section, **counts)


@dataclass
class Demo:
    """A demo under way.

    Args:
        run: the uptraining that it is built around.
        show: how much else is measured.
        tell: is given the stages and which of them begins.
    """

    run: Run
    show: Show
    tell: Callable[[dict[str, Any]], None]
    model: PreTrainedModel = field(init=False)
    original: PreTrainedModel = field(init=False)
    found: dict[str, Any] = field(default_factory=dict)
    converted_in: dict[str, float] = field(default_factory=dict)

    def diagnose(self) -> None:
        """Says what the model lacks for the work that `show` names."""
        self.model = load_model(self.run.job.model, self.run.job.dtype)
        self.original = copy.deepcopy(self.model)
        work = {"context": self.show.context, "batch": self.show.texts, "hardware": self.show.hardware}
        page = ap.diagnose(self.model, **work, training=False, losses=False)  # type: ignore[arg-type]  # by name
        decode, memory = page.work.phases["decode"], page.work.memory["decode"]
        self.found["diagnosis"] = {
            **work,
            "share": (decode.parts["cache"] + decode.parts["attention"]) / decode.seconds,
            "cache_bytes": memory.cache,
            "weight_bytes": memory.weights,
            "lacks": [asdict(lack) for lack in page.lacks],
            "answers": [each.code for each in page.prescriptions],
            "page": str(page),
        }

    def measure(self) -> None:
        """Scores the original and lets it write."""
        self.run.measure("original", self.original)
        self.write_text("original", self.original)

    def average(self) -> None:
        """Converts by the weights alone: by averaging, as everybody does, and by principal components."""
        for method, name in DATA_FREE.items():
            other = copy.deepcopy(self.original)
            self.convert(name, other, [self.patch(method)])
            self.run.measure(name, other)
            if method == "mean":
                self.write_text(name, other)

    def fit(self) -> None:
        """Converts with text, as the job says; this is the model that goes on."""
        report = self.convert("refined", self.model, list(self.run.patches()))
        self.found["report"] = {"checks": dict(report.checks), "stock": report.stock}
        self.run.measure("refined", self.model)
        self.write_text("refined", self.model)

    def patch(self, method: str) -> ap.Patch:
        """The job's patch with another method, without its text."""
        heads = getattr(self.run.job.patches[0], "num_kv_heads")  # noqa: B009 - a field of one kind of patch
        return ap.GroupedQuery(num_kv_heads=heads, method=method)  # type: ignore[arg-type]  # of DATA_FREE

    def convert(self, name: str, model: PreTrainedModel, patches: Sequence[ap.Patch]) -> ap.Report:
        """Applies patches and keeps the time."""
        started = time.perf_counter()
        report = ap.apply(model, *patches)
        self.converted_in[name] = time.perf_counter() - started
        return report

    @torch.no_grad()
    def write_text(self, name: str, model: PreTrainedModel) -> None:
        """Continues the prompts: the first draw of seed 0, whatever it is."""
        texts = self.found.setdefault("texts", {"prompts": PROMPTS, "written": {}})["written"]
        for key, prompt in PROMPTS.items():
            set_seed(0)
            given = self.run.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
            ids = model.generate(**given, max_new_tokens=self.show.written, **how)[0, given["input_ids"].shape[1] :]
            texts.setdefault(name, {})[key] = self.run.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def speed(self) -> None:
        """Times decoding of the original and the converted model, a token of each in turn."""
        models = {"original": self.original, "refined": self.model}
        caches, steps = {}, {name: [] for name in models}  # type: ignore[var-annotated]  # seconds by model
        with measuring(*models.values()):
            for name, model in models.items():
                caches[name] = prefill(model, self.show.speed_context, 1)[1]
                caches[name].batch_repeat_interleave(self.show.speed_batch)
            held = {name: held_bytes(cache) for name, cache in caches.items()}
            for _ in range(self.show.speed_tokens):
                for name, model in models.items():
                    steps[name].append(step(model, caches[name], self.show.speed_batch))
        rates = {name: self.show.speed_batch / statistics.median(each) for name, each in steps.items()}
        self.found["decoding"] = {
            "context": self.show.speed_context,
            "batch": self.show.speed_batch,
            "cache_bytes": held,
            "tokens_per_second": rates,
            "faster": statistics.median(a / b for a, b in zip(steps["original"], steps["refined"], strict=True)),
        }

    def stretch(self) -> None:
        """Reads documents that are longer than what the model was trained at, without training."""
        tokenizer, count = self.run.tokenizer, self.show.long
        every = documents(resolve(self.run.job.heldout))
        read = (tokenizer(text, verbose=False)["input_ids"] for text in every)
        texts = list(islice((ids[:count] for ids in read if len(ids) >= count), self.show.long_documents * 4))
        texts = texts[:: max(1, len(texts) // self.show.long_documents)][: self.show.long_documents]
        found = {}
        for name, patch in {"original": None, **STRETCHED}.items():
            model = self.original if patch is None else copy.deepcopy(self.original)
            if patch is not None:
                ap.apply(model, patch)
            found[name] = loss_by_position(model, texts, length=count, bins=self.show.long_bins, resamples=1)
        trained = int(self.original.config.max_position_embeddings)
        edges = found["original"].edges
        beyond = [i for i, start in enumerate(edges[:-1]) if start >= trained]
        nats = {name: [score.nats for score in each.scores] for name, each in found.items()}
        mean = {name: statistics.fmean(each[i] for i in beyond) if beyond else None for name, each in nats.items()}
        self.found["longer"] = {
            "trained": trained,
            "documents": len(texts),
            "edges": edges,
            "nats": nats,
            "beyond": mean,
        }

    def train(self) -> None:
        """Uptrains the converted model towards the original."""
        loss = uptrain.Distillation(self.original, self.run.accelerator.autocast)
        self.model, training = uptrain.uptrain(self.run, self.model, loss, resume=False)
        self.found["training"] = training
        self.run.measure("uptrained", self.model)
        self.write_text("uptrained", self.model)

    def publish(self) -> None:
        """Saves, and loads again with stock transformers in a process of its own."""
        self.found["reload"] = uptrain.finish(self.run, self.model, self.found["report"]["stock"])

    def metrics(self) -> dict[str, Any]:
        """Everything that was found."""
        run, first = self.run, self.run.scores["original"]
        return {
            "job": jobs.plain(run.job),
            "show": asdict(self.show),
            "scores": {stage: run.summary(stage) for stage in run.scores},
            "differences": {
                name: asdict(difference(first, each)) for name, each in run.scores.items() if each != first
            },
            "converted_in": self.converted_in,
            **self.found,
            "seconds": {name: round(value, 2) for name, value in run.seconds.items()},
            "machine": machine(run.accelerator),
        }


STAGES: dict[str, tuple[float, Callable[[Demo], None]]] = {  # what is said -> seconds of two idle cores, what is done
    "what the model lacks": (8, Demo.diagnose),
    "the original": (5, Demo.measure),
    "averaged and principal heads": (14, Demo.average),
    "heads fitted on text": (85, Demo.fit),
    "speed of decoding": (6, Demo.speed),
    "four times the trained context": (16, Demo.stretch),
    "training": (40, Demo.train),
    "saving, and loading by stock transformers": (8, Demo.publish),
}


def work(config: str, overrides: Sequence[str], tell: Callable[[dict[str, Any]], None]) -> None:
    """Does all stages in order, and writes metrics, page and picture."""
    tell({"stages": [[said, seconds] for said, (seconds, _) in STAGES.items()]})
    tell({"begins": 0})
    started = time.perf_counter()
    values = settings.read(config, overrides)
    show = settings.build(Show, values.pop(Show.section, None), Show.section)
    run = uptrain.start(jobs.build(values, config), resume=False)
    set_seed(run.job.train.seed)
    demo = Demo(run, show, tell)
    for number, (said, (_, stage)) in enumerate(STAGES.items()):
        tell({"begins": number})
        with run.clock(said):
            stage(demo)
    run.seconds["total"] = time.perf_counter() - started
    found = json.loads(json.dumps(demo.metrics()))
    write(run.job.output / "metrics.json", json.dumps(found, indent=1) + "\n")
    write(run.job.output / "demo.html", demo_page.page(found))
    write(run.job.output / "demo.svg", demo_page.picture(found))
    tell({"done": demo_page.summary(found)})


def main() -> None:
    """Reads the command line; stdout is for whoever shows the demo, all other words go to stderr."""
    arguments = settings.parser(__doc__).parse_args()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)

    def tell(what: dict[str, Any]) -> None:
        channel.write(json.dumps(what) + "\n")
        channel.flush()

    work(arguments.config, arguments.overrides, tell)


if __name__ == "__main__":
    settings.clearly(main, AttnPatchError, SettingsError, DataError, ResumeError, LossError)
