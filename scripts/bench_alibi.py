"""ALiBi by extra dimensions against plain attention and bias matrices; BLOOM and MPT with a fused kernel.

    python scripts/bench_alibi.py            # about ten minutes on an idle core, 14 GB for the stock models at 8192
    python scripts/bench_alibi.py --quick --out /tmp/alibi

All rivals of a row run in turns in one process. Ratios are of CPU time, medians over rounds, so that neighbours on the
machine count little; the best wall times stand beside them in the JSON. Peak memory is that of a process of its own for
each length. Logits are compared with the stock model's, and both with the stock model in fp64, on short text.

Writes `bench_alibi.json`, `bench_alibi.png` and `README.md` into `--out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

import hf_attnpatch as ap
from hf_attnpatch.evaluation.hardware import processor
from hf_attnpatch.evaluation.memory import peak_memory
from hf_attnpatch.functional.alibi import bias, slopes
from hf_attnpatch.functional.biased import Distance, Sight, attend
from hf_attnpatch.plotting import import_pyplot

HEADS, WIDTH = 8, 64
OUT = Path(__file__).parents[1] / "recipes" / "results" / "alibi"
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#E69F00", "v"))  # Okabe and Ito's
Row = dict[str, Any]


def race(rivals: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Run all rivals in turns: median CPU seconds and best wall seconds of each; the first turn is not counted."""
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            used, start = time.process_time(), time.perf_counter()
            run()
            if turn:
                cpu[name].append(time.process_time() - used)
                wall[name].append(time.perf_counter() - start)
    return {name: {"cpu": statistics.median(cpu[name]), "wall": min(wall[name])} for name in rivals}


def attention(length: int, dtype: torch.dtype, rounds: int) -> Row:
    """Plain causal flash attention, ALiBi by columns, and by a matrix of biases that is kept or built for each call."""
    query, key, value = (torch.randn(1, HEADS, length, WIDTH).to(dtype) for _ in range(3))
    slope, scale = slopes(HEADS), WIDTH**-0.5
    here = torch.arange(length)

    def matrix() -> Tensor:
        biases = bias(slope.float(), here, here)
        return biases.masked_fill_(here > here[:, None], -torch.inf).to(dtype)[None]

    kept = matrix()
    found = race(
        {
            "plain causal": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
            "ALiBi, columns": lambda: attend(query, key, value, Distance(slope), Sight(True), scale),
            "ALiBi, matrix kept": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=kept),
            "ALiBi, matrix built": lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=matrix()),
        },
        rounds,
    )
    return {"length": length, "dtype": str(dtype).removeprefix("torch."), "seconds": found}


def build(family: str, length: int, layers: int, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random BLOOM or MPT of width 1024 with 16 heads."""
    torch.manual_seed(0)
    if family == "bloom":
        config: Any = transformers.BloomConfig(vocab_size=1024, hidden_size=1024, n_head=16, n_layer=layers)
    else:
        config = transformers.MptConfig(vocab_size=1024, d_model=1024, n_heads=16, n_layers=layers, max_seq_len=length)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.inference_mode()
def prefill(family: str, length: int, layers: int, rounds: int) -> Row:
    """The prefill of a whole model: stock, and with a fused kernel inside its forward."""
    model, ids = build(family, length, layers), torch.randint(0, 1024, (1, length))
    fused = build(family, length, layers)
    fused.load_state_dict(model.state_dict())
    ap.patch_flash(fused)
    stock = model(ids, use_cache=False).logits
    apart = (stock - fused(ids, use_cache=False).logits).abs().max() / stock.abs().max()
    rivals = {name: lambda m=m: m(ids, use_cache=False) for name, m in (("stock", model), ("fused", fused))}
    return {
        "family": family,
        "length": length,
        "layers": layers,
        "seconds": race(rivals, rounds),
        "logits": float(apart),
    }


@torch.inference_mode()
def truth(family: str, length: int = 1024) -> Row:
    """How far the stock model and the fused one differ from the stock model in fp64."""
    ids = torch.randint(0, 1024, (1, length))
    exact, model = build(family, length, 2, torch.float64), build(family, length, 2)
    exact.load_state_dict(model.state_dict())
    wanted = exact(ids, use_cache=False).logits
    stock = model(ids, use_cache=False).logits
    ap.patch_flash(model)
    errors = [float((wanted - f).abs().max() / wanted.abs().max()) for f in (stock, model(ids, use_cache=False).logits)]
    return {"family": family, "length": length, "stock": errors[0], "fused": errors[1]}


@torch.inference_mode()
def peak(what: str, length: int) -> float:
    """MiB by which this process's peak grows; what is ``attention``, a family, or a family with ``-stock``."""
    torch.set_num_threads(2)
    if what == "attention":
        states = [torch.randn(1, HEADS, length, WIDTH) for _ in range(3)]
        small = [t[:, :, :64] for t in states]
        run: Callable[[list[Tensor]], object] = lambda s: attend(*s, Distance(slopes(HEADS)), Sight(True), WIDTH**-0.5)  # noqa: E731
        run(small)
        return grows(lambda: run(states))
    model = build(what.removesuffix("-stock"), length, 1)
    if not what.endswith("-stock"):
        ap.patch_flash(model)
    model(torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    return grows(lambda: model(torch.zeros(1, length, dtype=torch.long), use_cache=False))


def grows(run: Callable[[], object]) -> float:
    """MiB by which this process's peak grows."""
    gc.collect()
    with peak_memory(torch.device("cpu")) as found:
        run()
    if found.more is None:
        raise SystemExit("peak memory is read from /proc/self, which this system has not.")
    return found.more / 2**20


def measured_peak(what: str, length: int) -> Row:
    """The same in a process of its own."""
    run = [sys.executable, "-W", "ignore", __file__, "--peak", what, str(length)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return {"what": what, "length": length, "MiB": float(out.split()[-1])}


def ratio(row: Row, of: str, to: str) -> float:
    """CPU time of one rival over that of another."""
    return row["seconds"][of]["cpu"] / row["seconds"][to]["cpu"]


def _finding(found: dict[str, Any]) -> list[str]:
    """The longest attention in fp32, and the longest prefill of each family, in a sentence each."""
    attention = [row for row in found["attention"] if row["dtype"] == "float32"]
    if not attention or not found["prefill"]:
        return []
    row = max(attention, key=lambda row: row["length"])
    cpu = {name: seconds["cpu"] for name, seconds in row["seconds"].items()}
    longest = {each["family"]: each for each in sorted(found["prefill"], key=lambda each: each["length"])}
    gains = ", ".join(f"{name} {_both(each, 'stock', 'fused')}" for name, each in longest.items())
    return [
        f"**At {row['length']:,} tokens ALiBi takes {cpu['ALiBi, columns'] / cpu['plain causal']:.1f} times plain "
        "causal attention, and a matrix of biases that is kept "
        f"{cpu['ALiBi, matrix kept'] / cpu['ALiBi, columns']:.1f} times as long as that. Whole models read their "
        f"longest prompt so many times as fast as stock: {gains}.**",
        "",
    ]


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# ALiBi at flash speed",
        "",
        *_finding(found),
        f"`make bench-alibi` on {found['machine']}, {found['threads']} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Ratios of CPU time (of wall time in brackets), medians of "
        f"{found['rounds']} rounds in turns.",
        "",
        f"Attention alone, {HEADS} heads of {WIDTH}, batch 1. Columns are built anew in every call.",
        "",
        "| tokens | dtype | over plain causal | matrix kept, over columns | matrix built, over columns |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for row in found["attention"]:
        pairs = (("ALiBi, columns", "plain causal"), ("ALiBi, matrix kept", "ALiBi, columns"))
        cells = [_both(row, *pair) for pair in (*pairs, ("ALiBi, matrix built", "ALiBi, columns"))]
        lines.append(f"| {row['length']} | {row['dtype']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Prefill of whole models, width 1024, 16 heads, fp32, stock over fused.",
        "",
        "| model | layers | tokens | speed-up | logits apart |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["prefill"]:
        cells = f"{row['layers']} | {row['length']} | {_both(row, 'stock', 'fused')} | {row['logits']:.1e}"
        lines.append(f"| {row['family']} | {cells} |")
    lines += [
        "",
        "Linear layers and activations take the larger part of what is left. Logits are apart relative to the largest",
        "one. Stock and fused, from the stock model in fp64:",
        "",
    ]
    lines += [
        f"* {row['family']}, {row['length']} tokens: stock {row['stock']:.1e}, fused {row['fused']:.1e}"
        for row in found["truth"]
    ]
    lines += ["", "Peak memory beyond weights and inputs, fp32 (models: one layer).", ""]
    lines += ["| what | tokens | MiB |", "| --- | ---: | ---: |"]
    lines += [f"| {row['what']} | {row['length']} | {row['MiB']:.0f} |" for row in found["memory"]]
    return "\n".join(lines) + "\n"


def _both(row: Row, of: str, to: str) -> str:
    wall = row["seconds"][of]["wall"] / row["seconds"][to]["wall"]
    return f"{ratio(row, of, to):.2f} ({wall:.2f})"


def figure(found: dict[str, Any], path: Path) -> None:
    """Seconds against length, and memory."""
    panels, (left, right) = import_pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [row for row in found["attention"] if row["dtype"] == "float32"]
    for name, (colour, marker) in zip(rows[0]["seconds"], STYLES, strict=False):
        seconds = [r["seconds"][name]["cpu"] for r in rows]
        left.plot([r["length"] for r in rows], seconds, marker=marker, color=colour, label=name)
    for what, (colour, marker) in zip(dict.fromkeys(row["what"] for row in found["memory"]), STYLES, strict=False):
        mine = [row for row in found["memory"] if row["what"] == what]
        peaks = [max(r["MiB"], 1) for r in mine]
        right.plot([r["length"] for r in mine], peaks, marker=marker, color=colour, label=what)
    for axis, label in ((left, f"CPU seconds, {HEADS} heads of {WIDTH}, fp32"), (right, "peak MiB")):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        lengths = sorted({int(x) for line in axis.lines for x in line.get_xdata()})
        axis.set_xticks(lengths, [str(n) for n in lengths], fontsize=7)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    panels.savefig(path, dpi=130)


def jobs(short: bool, rounds: int) -> dict[str, list[Callable[[], Row]]]:
    """What to measure, by part of the results."""
    peaks = {"attention": (8192, 32768), "bloom": (2048, 4096, 8192), "bloom-stock": (2048, 4096)}
    peaks |= {"mpt": (2048, 4096, 8192), "mpt-stock": (2048, 4096)}
    return {
        "attention": [
            partial(attention, n, d, rounds)
            for n in ((256, 512) if short else (2048, 4096, 8192))
            for d in (torch.float32, torch.bfloat16)
        ],
        "truth": [partial(truth, f, 128 if short else 4096) for f in ("bloom", "mpt")],
        "prefill": [
            partial(prefill, f, n, 1, rounds) for f in ("bloom", "mpt") for n in ((128,) if short else (4096, 8192))
        ],
        "memory": [
            partial(measured_peak, what, n) for what, long in peaks.items() for n in ((256,) if short else long)
        ],
    }


def measure(parts: Mapping[str, Sequence[Callable[[], Row]]], found: dict[str, Any], file: Path) -> None:
    """Run the parts that are not found yet, and write after each."""
    for part, runs in parts.items():
        if part in found:
            continue
        found[part] = []
        for run in runs:
            found[part].append(run())
            gc.collect()
            print(json.dumps(found[part][-1]), flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep the parts that are measured")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.peak[0], int(given.peak[1])))
        return
    found: dict[str, Any] = {
        "machine": processor(torch.device("cpu")),
        "threads": given.threads,
        "rounds": given.rounds,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "bench_alibi.json"
    if given.resume and file.is_file():
        found = {**json.loads(file.read_text()), **found}
    measure(jobs(given.quick, given.rounds), found, file)
    (given.out / "README.md").write_text(markdown(found) + "\n![time and memory](bench_alibi.png)\n")
    figure(found, given.out / "bench_alibi.png")


if __name__ == "__main__":
    main()
