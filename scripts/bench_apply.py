"""What patching costs: the forward of a patched model, the time of `apply`, the memory during `apply`.

    python scripts/bench_apply.py                    # about five minutes on one core
    python scripts/bench_apply.py --quick --out /tmp/bench

Times are CPU time of one thread, so that neighbours on the machine count little; the two sides of a ratio run in turns
in one process, and medians are compared. Memory is the process's peak resident size, which Linux lets one reset.
Writes `bench_apply.json` and `bench_apply.png` into `--out` and, where that is the default, the README's figures.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import readme
import torch
import transformers
from bench_report import figure, markdown, table
from rich.console import Console
from rich.progress import track
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.evaluation.memory import peak_memory, resident
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.caches import returned
from hf_attnpatch.upstream.roles import run

OUT = Path(__file__).resolve().parents[1] / "recipes/results/apply"
PATCH = ap.GroupedQuery(num_kv_heads=2, method="mean")
MIB = 2**20

Row = dict[str, Any]


def llama(hidden: int, layers: int, kv_heads: int = 8) -> PreTrainedModel:
    """A Llama with 8 heads; a small vocabulary, so that attention and the feed-forward are what is timed."""
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 2 * hidden, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval()


def gpt2(hidden: int, layers: int) -> PreTrainedModel:
    """A GPT-2 with 8 heads."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=hidden, n_layer=layers, n_head=8, vocab_size=512, bos_token_id=0, eos_token_id=0)
    ).eval()


# -- the forward ------------------------------------------------------------------------------------------------------


def in_turns(first: Callable[[], object], second: Callable[[], object], rounds: int, name: str) -> Row:
    """Median times of both in milliseconds, and the ratio of the medians with a 95 % bootstrap interval."""
    times: tuple[list[float], list[float]] = ([], [])
    for index in track(range(rounds + 3), name.ljust(44), console=Console(stderr=True)):
        for side in (0, 1) if index % 2 else (1, 0):
            start = time.process_time()
            (first, second)[side]()
            if index >= 3:  # the first rounds warm up
                times[side].append(1e3 * (time.process_time() - start))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(t, dtype=torch.float64) for t in times)
    picks = torch.randint(len(a), (2000, len(a)), generator=generator)  # the same rounds of both sides
    ratios = (a[picks].median(1).values / b[picks].median(1).values).sort().values
    medians = [statistics.median(t) for t in times]
    low, high = float(ratios[50]), float(ratios[-51])
    return {"patched ms": medians[0], "other ms": medians[1], "ratio": medians[0] / medians[1], "interval": [low, high]}


@torch.no_grad()
def forward(patched: PreTrainedModel, other: PreTrainedModel, rounds: int, name: str) -> list[Row]:
    """A prefill of 256 tokens and one decoding step after it, of both models in turns."""
    tokens = torch.arange(256)[None] % 512

    def prefill(model: PreTrainedModel) -> Callable[[], object]:
        return lambda: model(tokens, use_cache=False)

    def step(model: PreTrainedModel) -> Callable[[], object]:
        cache: Any = next(iter(returned(run(model, {words.TOKENS: tokens, words.USE_CACHE: True})).values()))

        def go() -> None:
            run(model, {words.TOKENS: tokens[:, :1], words.CACHE: cache, words.USE_CACHE: True})
            cache.crop(-1)

        return go

    return [
        {"what": f"{name}, prefill 256", **in_turns(prefill(patched), prefill(other), rounds, f"{name}, prefill")},
        {"what": f"{name}, decode 1", **in_turns(step(patched), step(other), 4 * rounds, f"{name}, decode")},
    ]


def forwards(hidden: int, layers: int, rounds: int) -> list[Row]:
    """Llama 8 -> 2 against the same shape built natively; GPT-2 8 -> 2 against its multi-head original."""
    patched, native = llama(hidden, layers), llama(hidden, layers, kv_heads=2)
    ap.apply(patched, PATCH)
    native.load_state_dict(patched.state_dict())
    original = gpt2(hidden, layers)
    foreign = copy.deepcopy(original)
    ap.apply(foreign, PATCH)
    rows = forward(patched, native, rounds, "Llama 8 -> 2 / built so")
    return rows + forward(foreign, original, rounds, "GPT-2 8 -> 2 / multi-head")


# -- apply ------------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def replaced(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that the patch replaces."""
    paths = [edit.path for edit in ap.plan(model, PATCH).edits if edit.rung == "module"]
    return [p.detach() for path in paths for p in model.get_submodule(path).parameters()]


def apply_time(model: PreTrainedModel, repeats: int, name: str) -> Row:
    """Medians in milliseconds: a copy of the replaced weights, and `apply` by its parts."""
    weights = replaced(model)
    parts: dict[str, list[float]] = {"copy": [], "weights": [], "plan": [], "apply": [], "apply unchecked": []}
    for _ in track(range(repeats), f"apply, {name}".ljust(44), console=Console(stderr=True)):
        parts["copy"].append(seconds(lambda: [w.clone() for w in weights]))
        parts["plan"].append(seconds(lambda: ap.plan(model, PATCH)))
        parts["weights"].append(_edits(model))
        for key, check in (("apply", True), ("apply unchecked", False)):
            start = time.process_time()
            report = ap.apply(model, PATCH, self_check=check)
            parts[key].append(time.process_time() - start)
            report.revert()
    ms = {key: 1e3 * statistics.median(times) for key, times in parts.items()}
    return {
        **{"what": name, "replaced MiB": sum(w.numel() * w.element_size() for w in weights) / MIB},
        **{"copy ms": ms["copy"], "weights ms": ms["weights"], "plan ms": ms["plan"]},
        **{"self-check ms": max(ms["apply"] - ms["apply unchecked"], 0.0), "apply ms": ms["apply"]},
        **{"weights / copy": ms["weights"] / ms["copy"], "apply / copy": ms["apply"] / ms["copy"]},
    }


def _edits(model: PreTrainedModel) -> float:
    """Seconds for the edits that make and set the new weights; taken back afterwards."""
    edits = [edit for edit in ap.plan(model, PATCH).edits if edit.rung == "module"]
    start = time.process_time()
    inverses = [edit.run(model) for edit in edits]
    took = time.process_time() - start
    for inverse in reversed(inverses):
        inverse.undo()
    return took


def apply_memory(build: Callable[[], PreTrainedModel], name: str) -> Row:
    """Resident MiB: before, at the peak of `apply`, with its report held, and after the report was dropped."""
    ap.apply(llama(64, 2), PATCH)  # whatever the first apply of a process allocates for good
    model = build()
    before = [w.numel() * w.element_size() for w in replaced(model)]
    gc.collect()
    with peak_memory(torch.device("cpu")) as found:
        report = ap.apply(model, PATCH)
    assert found.before is not None, "memory is read from /proc/self: Linux only"
    assert found.bytes is not None
    start, peak, held = found.before / MIB, found.bytes / MIB, resident() / MIB
    new = [w.numel() * w.element_size() for w in replaced_by(model, report)]
    del report
    gc.collect()
    layer = sum(new) / model.config.num_hidden_layers / MIB
    return {
        **{"what": name, "old weights MiB": sum(before) / MIB, "new weights MiB": sum(new) / MIB},
        **{"one layer's new MiB": layer, "peak extra MiB": peak - start, "held with report MiB": held - start},
        **{"transient MiB": peak - held, "after report MiB": resident() / MIB - start},
    }


def replaced_by(model: PreTrainedModel, report: ap.Report) -> list[torch.Tensor]:
    """The weights that a report's edits have put there."""
    paths = [edit.path for edit in report.plan.edits if edit.rung == "module"]
    return [p.detach() for path in paths for p in model.get_submodule(path).parameters()]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: does it run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: a freed tensor goes back to the system at once
    big, rounds, repeats = (256, 3, 3) if arguments.quick else (2048, 60, 7)
    memory = [apply_memory(lambda: llama(big, 8), f"Llama, 8 layers of {big}")]
    found = {
        "forward": forwards(256 if arguments.quick else 512, 4, rounds),
        "apply": [
            apply_time(llama(big, 8), repeats, f"Llama, 8 layers of {big}"),
            apply_time(gpt2(big, 8), repeats, f"GPT-2, 8 layers of {big}"),
            apply_time(llama(64, 2), 3 * repeats, "Llama, 2 layers of 64"),
        ],
        "memory": memory,
    }
    console = Console(width=170)
    for title, rows in found.items():
        console.print(table(title, rows))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cpu": platform.machine()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "bench_apply.json").write_text(json.dumps({"versions": versions, **found}, indent=1) + "\n")
    if arguments.out == OUT:
        readme.write("bench", markdown({"versions": versions, **found}))
    figure(found, arguments.out / "bench_apply.png")
    print(f"wrote {arguments.out}/bench_apply.json and bench_apply.png")


if __name__ == "__main__":
    main()
