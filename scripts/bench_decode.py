"""Decoding speed and cache bytes against context length: multi-head, grouped and multi-query of one model.

    python scripts/bench_decode.py                   # about six minutes on one core, 5 GB
    python scripts/bench_decode.py --quick --out /tmp/decode
    python scripts/bench_decode.py --model data/smollm2-mha --kv 9,3,1 --contexts 512,2048,8192 --out outputs/decode

For each context a cache is filled with random keys and values, and one token is decoded again and again on it; all
variants and paths (`decode_paths.py` says what they are) run in turns in one process, with the memory bandwidth beside
them: the best time in which this process sums or dots a buffer much larger than its caches. From the bytes that a step
must read (weights and cache) follows the least time it could take. With one thread times are CPU time, so that
neighbours on the machine count little; with more, wall time.

Writes `bench_decode.json` (all times in it) after every context, which `--resume` continues, and `bench_decode.png`
into `--out`; where that is the default also the README's part.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode_paths as paths
import readme
import torch
import transformers
from decode_report import figure, markdown, tables
from decode_rows import alone, key, steps
from rich.console import Console
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_attnpatch.evaluation.hardware import processor
from hf_attnpatch.evaluation.limits import product, readers
from hf_attnpatch.evaluation.memory import held_bytes
from hf_attnpatch.evaluation.timing import Times, Work, in_turns, ratio
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import run as run_model

OUT = Path(__file__).resolve().parents[1] / "recipes/results/decode"
PATHS = "dynamic+sdpa+glibc,dynamic+sdpa,dynamic+folded,static+sdpa"

Row = dict[str, Any]


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The variants by their key-value heads, multi-head first; what the run was asked for."""

    models: dict[int, PreTrainedModel]
    settings: Row

    @property
    def heads(self) -> int:
        """Key-value heads of the multi-head model."""
        return next(iter(self.models))

    def step(self, path: paths.DecodePath, kv: int, cache: Cache) -> Work:
        """One decoding step of the whole model, taken back afterwards."""
        model, token = self.models[kv], torch.zeros(self.settings["batch"], 1, dtype=torch.long)
        return Work(
            lambda: run_model(model, {words.TOKENS: token, words.CACHE: cache, words.USE_CACHE: True}),
            before=lambda: paths.choose_attention(model, path.attention),
            after=lambda: paths.take_back(cache),
        )

    @torch.no_grad()
    def at(self, context: int, chosen: list[paths.DecodePath]) -> Row:
        """All paths and variants at one context and, unless the allocator is glibc's, the attention alone."""
        model, caches, seen = self.models[self.heads], {}, {}
        work = {**readers(self.settings["buffer MiB"]), **product(model.dtype)}
        for path in chosen:
            for kv, variant in self.models.items():
                cache = caches[path, kv] = paths.filled(variant, path, context, self.settings["batch"])
                work[key(path, kv)] = self.step(path, kv, cache)
                seen[key(path, kv)] = paths.sdpa_call(work[key(path, kv)])
        times = in_turns(work, self.settings["rounds"])
        held = {} if chosen[0].glibc else {kv: caches[chosen[-1], kv] for kv in self.models}
        return {"context": context, "ms": times, "alone": self.attention_alone(held, context), "sdpa": seen}

    def attention_alone(self, caches: dict[int, Cache], context: int) -> Times:
        """Every formulation of the attention on the caches' own tensors, through all layers."""
        work = {}
        layers = {kv: list(paths.keys_and_values(cache, context)) for kv, cache in caches.items()}
        for how, attend in paths.FORMULATIONS.items():
            for kv in layers:  # innermost, so that another cache was read in between
                (batch, _, _, size), dtype = layers[kv][0][0].shape, layers[kv][0][0].dtype
                query = torch.randn(batch, self.heads, 1, size).to(dtype)
                work[key(how, kv)] = Work(functools.partial(paths.through, attend, query, layers[kv]))
        return in_turns(work, max(self.settings["rounds"] // 4, 3)) if work else {}

    @torch.no_grad()
    def as_prefilled(self, context: int) -> list[Row]:
        """Whether a step on a filled cache takes what it takes on one that the model filled itself."""
        path, rows = paths.DecodePath("dynamic", "sdpa"), []
        for kv in (self.heads, min(self.models)):
            makers = {"filled": paths.filled, "prefilled": paths.prefilled}
            caches = {how: make(self.models[kv], path, context, self.settings["batch"]) for how, make in makers.items()}
            held = [held_bytes(cache) for cache in caches.values()]
            assert held[0] == held[1], f"{kv} heads: filled and prefilled caches hold {held} bytes"
            times = in_turns(
                {how: self.step(path, kv, cache) for how, cache in caches.items()}, 4 * self.settings["rounds"]
            )
            found, interval = ratio(times["filled"], times["prefilled"])
            rows.append({"kv": kv, "context": context, "filled / prefilled": found, "interval": interval})
        return rows


# -- the run ----------------------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = functools.partial(_list_of, int)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--model", help="folder or hub name of a multi-head model; else a random Llama of 4 x 1024")
    parser.add_argument("--kv", type=numbers, default=[16, 4, 1], help="counts of key-value heads, multi-head first")
    parser.add_argument("--contexts", type=numbers, default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--paths", type=functools.partial(_list_of, paths.DecodePath.parse), default=PATHS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--passes", type=int, default=4, help="over all contexts, so that a busy minute is not one's own"
    )
    parser.add_argument("--rounds", type=int, default=20, help="in each pass")
    parser.add_argument("--resume", action="store_true", help="keep the contexts that are in the JSON of --out")
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds: does it run")
    return parser.parse_args()


def _list_of(kind: Callable[[str], Any], text: str) -> list[Any]:
    return [kind(part) for part in text.split(",")]


def settings_of(chosen: argparse.Namespace) -> Row:
    """What must be the same for two runs to be parts of one."""
    small = chosen.quick
    return {
        **{"model": chosen.model or ("Llama, 2 layers of 64" if small else "Llama, 4 layers of 1024, random")},
        **{"kv": chosen.kv, "batch": chosen.batch, "dtype": chosen.dtype, "threads": chosen.threads},
        **{"passes": 2 if small else chosen.passes, "rounds": 3 if small else chosen.rounds},
        **{"buffer MiB": 8 if small else 512, "cpu": processor(torch.device("cpu"))},
        **{"torch": torch.__version__, "transformers": transformers.__version__},
    }


def begun(file: Path, settings: Row, resume: bool) -> Row:
    """The results so far: those of the file, or none."""
    fresh: Row = {"settings": settings, "variants": [], "prefilled": [], "done": []}
    if not resume or not file.is_file():
        return fresh
    found: Row = json.loads(file.read_text("utf-8"))
    other = [key for key, value in settings.items() if found["settings"].get(key) != value]
    if other:
        was = {key: found["settings"].get(key) for key in other}
        raise SystemExit(
            f"bench_decode: {file} was made with {was}; run it so, without --resume, or choose another --out."
        )
    return found


def save(found: Row, file: Path) -> None:
    """Writes the JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    text = re.sub(r"\[[\s\d.,e-]+\]", lambda match: re.sub(r"\s+", "", match[0]), json.dumps(found, indent=1))
    part.write_text(text + "\n", "utf-8")  # numbers of a list in one line
    part.replace(file)


def run(found: Row, chosen: argparse.Namespace, file: Path) -> None:
    """Measures what is not there yet; saves after every context. Paths with glibc's own allocator come first."""
    dtype, (hidden, layers) = getattr(torch, chosen.dtype), (64, 2) if chosen.quick else (1024, 4)
    base = chosen.model or functools.partial(paths.llama, hidden, chosen.kv[0], layers, dtype)
    bench = Bench(paths.variants(chosen.kv, base, dtype), found["settings"])
    found["variants"] = paths.byte_table(bench.models, chosen.batch)
    found["attention operations a token"] = paths.attention_operations(bench.models[bench.heads])
    for glibc in (True, False):
        group = [path for path in chosen.paths if path.glibc == glibc]
        if group and not glibc:
            paths.keep_memory()
            found["prefilled"] = found["prefilled"] or bench.as_prefilled(min(chosen.contexts))
        turns = [(turn, context) for turn in range(found["settings"]["passes"]) for context in chosen.contexts]
        for turn, context in turns if group else []:
            _one(found, bench, turn, context, group)
            save(found, file)
            gc.collect()


def _one(found: Row, bench: Bench, turn: int, context: int, group: list[paths.DecodePath]) -> None:
    entries = [entry for entry in found["done"] if (entry["pass"], entry["context"]) == (turn, context)]
    done = {name.partition(" | ")[0] for entry in entries for name in entry["sdpa"]}
    if left := [path for path in group if str(path) not in done]:
        print(f"pass {turn}, context {context}: {', '.join(map(str, left))}", flush=True)
        found["done"].append({"pass": turn, **bench.at(context, left)})


def main() -> None:
    """Measures, prints, writes."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    file = chosen.out / "bench_decode.json"
    found = begun(file, settings_of(chosen), chosen.resume)
    run(found, chosen, file)
    save({**found, "steps": steps(found), "attention": alone(found)}, file)
    console = Console(width=170)
    for table in tables(found):
        console.print(table)
    figure(found, chosen.out / "bench_decode.png")
    if chosen.out == OUT:
        readme.write("decode", markdown(found))
    print(f"wrote {file} and bench_decode.png")


if __name__ == "__main__":
    main()
