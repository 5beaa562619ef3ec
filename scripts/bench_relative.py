"""Transformer-XL's attention by extra dimensions against the paper's shifted matrix, and against plain attention.

    python scripts/bench_relative.py            # minutes on an idle core
    python scripts/bench_relative.py --quick --out /tmp/relative

Rivals run in turns in one process, forward alone and with backward; ratios are of CPU time, medians over rounds.
Peak memory is that of a process of its own for each. Writes `bench_relative.json` and `README.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from bench_alibi import HEADS, WIDTH, grows, race
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hf_attnpatch.attention.relative import RelativeTerms
from hf_attnpatch.evaluation.hardware import processor
from hf_attnpatch.functional.biased import Sight
from hf_attnpatch.functional.relative import encoding

OUT = Path(__file__).parents[1] / "recipes" / "results" / "relative"
SCALE = WIDTH**-0.5
NAMES = {"plain": "plain causal", "columns": "further dimensions", "shifted": "shifted matrix"}


def shifted(terms: RelativeTerms, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The paper's way (1901.02860, appendix B): queries times all distances, each row shifted by its place."""
    length, size = query.shape[2], terms.weight.shape[2]
    known = encoding(torch.arange(length - 1, -1, -1), size, terms.theta).to(query.dtype)
    by_distance = (query + terms.v[:, None]) @ (terms.weight @ known.T)
    padded = F.pad(by_distance, (1, 0)).view(*query.shape[:2], length + 1, length)
    scores = (query + terms.u[:, None]) @ key.transpose(-1, -2) + padded[:, :, 1:].reshape(by_distance.shape)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (SCALE * scores).masked_fill(hidden, -torch.inf).softmax(-1) @ value


def rivals(length: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """The three ways on the same states."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype) for _ in range(3)]
    terms = RelativeTerms(HEADS, WIDTH, WIDTH, 10000.0, states[0])
    with torch.no_grad():
        for parameter in terms.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    for state in states:
        state.requires_grad_(backward)
    terms.requires_grad_(backward)
    ways = {
        "plain": lambda: F.scaled_dot_product_attention(*states, is_causal=True),
        "columns": lambda: terms.attend(*states, Sight(True), SCALE, 0.0),
        "shifted": lambda: shifted(terms, *states),
    }
    return {name: (lambda w=way: w().sum().backward()) if backward else way for name, way in ways.items()}


def measured(length: int, dtype: torch.dtype, backward: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each way, and how far the two ways of the same attention are apart."""
    ways = rivals(length, dtype, backward)
    row: dict[str, Any] = {"length": length, "dtype": str(dtype).removeprefix("torch."), "backward": backward}
    if not backward:
        with torch.no_grad():
            row["apart"] = float((ways["columns"]() - ways["shifted"]()).abs().max())
    return {**row, "seconds": race(ways, rounds)}


def peak(way: str, length: int) -> float:
    """MiB by which the peak of a process of its own grows, fp32, forward."""
    run = [sys.executable, "-W", "ignore", __file__, "--peak", way, str(length)]
    return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()[-1])


def _finding(found: dict[str, Any]) -> list[str]:
    """The longest forward in fp32, in a sentence."""
    rows = [row for row in found["rows"] if row["dtype"] == "float32" and not row["backward"]]
    row = max(rows, key=lambda row: row["length"])
    cpu = {name: row["seconds"][name]["cpu"] for name in NAMES}
    peaks = {way: found["peaks"][way][str(row["length"])] for way in ("columns", "shifted")}
    return [
        f"**At {row['length']:,} tokens further dimensions take {cpu['columns'] / cpu['plain']:.1f} times plain causal "
        f"attention. The paper's shifted matrix takes {cpu['shifted'] / cpu['columns']:.1f} times as long as that, and "
        f"{peaks['shifted'] / peaks['columns']:.0f} times the memory.**",
        "",
    ]


def page(found: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Transformer-XL's attention at flash speed",
        "",
        *_finding(found),
        f"`make bench-relative` on {found['machine']}, {found['threads']} threads, torch {torch.__version__}: {HEADS} "
        f"heads of {WIDTH}, R of {WIDTH}, batch 1; ratios of CPU time, medians of {found['rounds']} rounds in turns.",
        "",
        "| tokens | dtype | pass | further dimensions, over plain causal | shifted matrix, over further dimensions |",
        "| ---: | --- | --- | ---: | ---: |",
    ]
    for row in found["rows"]:
        cpu = {name: row["seconds"][name]["cpu"] for name in NAMES}
        how = "forward and backward" if row["backward"] else "forward"
        ratios = f"{cpu['columns'] / cpu['plain']:.2f} | {cpu['shifted'] / cpu['columns']:.2f}"
        lines.append(f"| {row['length']} | {row['dtype']} | {how} | {ratios} |")
    lines += ["", "Peak memory of the forward beyond its inputs, fp32, MiB:", ""]
    lengths = list(next(iter(found["peaks"].values())))
    lines += ["| way | " + " | ".join(lengths) + " |", "| --- " + "| ---: " * len(lengths) + "|"]
    for way, row in found["peaks"].items():
        lines.append(f"| {NAMES[way]} | " + " | ".join(f"{row[n]:.0f}" for n in lengths) + " |")
    apart = max(row["apart"] for row in found["rows"] if "apart" in row and row["dtype"] == "float32")
    return "\n".join([*lines, "", f"Both ways of the same attention are at most {apart:.1e} apart in fp32."]) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short texts, once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        with torch.no_grad():
            rivals(64, torch.float32, False)[given.peak[0]]()
            run = rivals(int(given.peak[1]), torch.float32, False)[given.peak[0]]
            print(grows(run))
        return
    lengths, rounds = ((256, 512), 1) if given.quick else ((1024, 2048, 4096), 5)
    cases = [(n, t, b) for n in lengths for t in (torch.float32, torch.bfloat16) for b in (False, True)]
    rows = [measured(*case, rounds) for case in cases]
    peaks = {way: {str(n): peak(way, n) for n in lengths} for way in NAMES}
    found = {
        "machine": processor(torch.device("cpu")),
        "threads": given.threads,
        "rounds": rounds,
        "rows": rows,
        "peaks": peaks,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bench_relative.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "README.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
