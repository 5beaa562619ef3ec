"""Converting checkpoints of growing size: time against a copy of the files, and the memory that it takes.

    python scripts/bench_scale.py                                # half an hour of one idle core
    python scripts/bench_scale.py --gigabytes 4 8 --kinds mean   # larger ones; measured rows of other sizes are kept
    python scripts/bench_scale.py --render                       # the page again, from what was measured

Synthetic Llamas in shards of a quarter of a gigabyte, one more layer for each 100 MB, are converted by `attnpatch
apply`, each in a process of its own. CPU seconds are the process's, with what it spent in the system; "beyond start-up"
is without what the same command takes on a model of some MB. Memory is anonymous memory at its peak (RssAnon), which a
machine must have: files are mapped, and their pages are given up when room is needed. Written are bytes that went into
files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic_llama
import torch
import transformers

from hf_attnpatch import embedded

OUT = Path(__file__).resolve().parents[1] / "recipes/results/scale"
HEADS = "grouped_query:num_kv_heads=2"
TEXT = ("--calibration", "text.txt", "--sequences", "8", "--length", "256")
KINDS = {
    "config only": ("-p", "rope_scaling:kind=yarn,factor=2"),
    "mean": ("-p", f"{HEADS},method=mean"),
    "principal": ("-p", f"{HEADS},method=principal"),
    "calibrated": ("-p", f"{HEADS},method=calibrated", *TEXT),
    "refined": ("-p", f"{HEADS},method=refined,refine_steps=10", *TEXT),
}
HIDDEN = 2048
COPY = "copy of the files"
Row = dict[str, Any]


def measured(command: list[str], folder: Path) -> Row:
    """Run a command to its end; return CPU seconds, wall seconds, the peak of anonymous memory and bytes written."""
    before, begin, peak, written = os.times(), time.monotonic(), 0, 0
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            counts = Path(f"/proc/{process.pid}/io").read_text()
        except OSError:  # it has just ended
            break
        peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        found = [int(line.split()[1]) for line in counts.splitlines() if line.startswith("write_bytes")]
        written = max([written, *found])
        time.sleep(0.05)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {said}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu": cpu, "wall": time.monotonic() - begin, "anonymous": peak * 1024, "written": written}


def apply(kind: str, folder: Path, source: str) -> Row:
    """Convert a checkpoint in a process of its own."""
    found = measured([sys.executable, "-m", "hf_attnpatch.cli", "apply", source, "out", *KINDS[kind]], folder)
    shutil.rmtree(folder / "out")
    return found


def rows_of(work: Path, gigabytes: float, kinds: list[str], hidden: int, start: dict[str, float]) -> list[Row]:
    """Measure all kinds on a checkpoint of one size."""
    layers = max(2, round(gigabytes * 1e9 / synthetic_llama.layer_bytes(hidden)))
    size = synthetic_llama.write(work / "source", hidden, layers)
    shape = {"bytes": size, "layers": layers, "hidden": hidden}
    rows = []
    for what in (COPY, *kinds):
        if what == COPY:
            found = measured(["cp", "-r", "--reflink=never", "source", "copy"], work)
            shutil.rmtree(work / "copy")
        else:
            found = apply(what, work, "source")
            found["beyond"] = found["cpu"] - start[what]
            found["copies"] = found["beyond"] / rows[0]["cpu"]
        rows.append({"what": what, **shape, **found})
        print(rows[-1], flush=True)
    shutil.rmtree(work / "source")
    return rows


def slope(rows: list[Row], what: str, value: str) -> float | None:
    """Return what a further layer adds, fitted over all sizes of the same width."""
    points = [(row["layers"], row[value]) for row in rows if row["what"] == what and value in row]
    if len({layers for layers, _ in points}) < 2:
        return None
    x, y = (torch.tensor(each, dtype=torch.float64) for each in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def page(found: dict[str, Any]) -> str:
    """Return the table and the growth law."""
    rows: list[Row] = found["rows"]
    lines = [
        "| what | weights, GB | layers | CPU s | beyond start-up | times a copy | anonymous memory, MB | written, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (row["hidden"], [COPY, *KINDS].index(row["what"]), row["bytes"])):
        more = [f"{row[key]:.1f}" if key in row else "" for key in ("beyond", "copies")]
        cells = [row["what"], f"{row['bytes'] / 1e9:.2f}", row["layers"], f"{row['cpu']:.1f}", *more]
        cells += [f"{row['anonymous'] / 1e6:.0f}", f"{row['written'] / 1e9:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    grows = ["| what | width | one more layer: CPU s | anonymous memory, MB | bytes of the layer, MB |"]
    grows.append("| --- | ---: | ---: | ---: | ---: |")
    for hidden in sorted({row["hidden"] for row in rows}):
        mine = [row for row in rows if row["hidden"] == hidden]
        for what in (COPY, *KINDS):
            cpu, memory = (slope(mine, what, value) for value in ("cpu", "anonymous"))
            if cpu is not None and memory is not None:
                layer = synthetic_llama.layer_bytes(hidden) / 1e6
                grows.append(f"| {what} | {hidden} | {cpu:.2f} | {memory / 1e6:.1f} | {layer:.0f} |")
    text = " ".join((__doc__ or "").split("\n\n")[-1].split())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    start = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in found["start"].items())
    parts = ("# Checkpoints larger than memory", f"`python scripts/bench_scale.py`. {text}", "\n".join(lines))
    return "\n\n".join((*parts, "## Growth", "\n".join(grows), f"Start-up: {start}. {versions}.", ""))


def figure(found: dict[str, Any], file: Path) -> None:
    """Draw time and memory over size."""
    from hf_attnpatch.plotting import import_pyplot

    pyplot = import_pyplot("the figure")
    drawn, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for what in (COPY, *KINDS):
        for hidden, style in zip(sorted({row["hidden"] for row in found["rows"]}), ("o--", "s-"), strict=False):
            mine = [row for row in found["rows"] if row["what"] == what and row["hidden"] == hidden]
            mine.sort(key=lambda row: row["bytes"])
            if mine:
                x = [row["bytes"] / 1e9 for row in mine]
                axes[0].plot(x, [row.get("beyond", row["cpu"]) for row in mine], style, label=f"{what}, width {hidden}")
                axes[1].plot(x, [row["anonymous"] / 1e6 for row in mine], style)
    axes[0].set(title="CPU seconds beyond start-up", xlabel="weights, GB", yscale="log")
    axes[1].set(title="peak of anonymous memory, MB", xlabel="weights, GB", ylim=(0, None))
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    drawn.savefig(file, dpi=130)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", nargs="+", type=float, default=[0.5, 1, 2])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "scale.json"
    found = json.loads(file.read_text()) if file.is_file() else {"rows": [], "start": {}}
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory(prefix="scale-", dir=".") as folder:
        work = Path(folder).resolve()
        (work / "text.txt").write_text("\n".join(embedded.heldout("prose")))
        if not arguments.render:
            synthetic_llama.write(work / "small", 512, 2, 1 << 20)
        for kind in () if arguments.render else arguments.kinds:
            if kind not in found["start"]:
                found["start"][kind] = apply(kind, work, "small")["cpu"]
        for size in () if arguments.render else arguments.gigabytes:
            new = rows_of(work, size, arguments.kinds, arguments.hidden, found["start"])
            same = {(row["what"], row["bytes"]) for row in new}
            found["rows"] = [row for row in found["rows"] if (row["what"], row["bytes"]) not in same] + new
            file.write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "README.md").write_text(page(found))
    figure(found, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
