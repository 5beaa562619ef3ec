"""Converting checkpoints of growing size: time against a copy of the files, and the memory that it takes.

    python scripts/bench_scale.py                                # half an hour of one idle core
    python scripts/bench_scale.py --gigabytes 4 8 --kinds mean   # larger ones; measured rows of other sizes are kept
    python scripts/bench_scale.py --render                       # the page again, from what was measured

Synthetic Llamas in shards of a quarter of a gigabyte are converted by `attnpatch apply`, in forks of a process that has
imported everything and converted a small model: start-up is in none of the figures. CPU seconds are those of the fork,
with what it spent in the system; files are in the page cache. Memory is anonymous memory (RssAnon) at its peak above
that at the fork, which a machine must have: files are mapped, and their pages are given up when room is needed. Written
are bytes that went into files. A copy is one of all files by `cp`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic_llama
import torch
import transformers

from hf_attnpatch import cli, embedded

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


def figures(process: int) -> tuple[int, int]:
    """Return the anonymous memory of a process in bytes, and the bytes that it has written."""
    try:
        status = Path(f"/proc/{process}/status").read_text().splitlines()
        counts = Path(f"/proc/{process}/io").read_text().splitlines()
    except OSError:  # it has just ended
        return 0, 0
    memory = sum(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return memory * 1024, sum(int(line.split()[1]) for line in counts if line.startswith("write_bytes"))


def watched(process: int) -> Row:
    """Wait for a process; return CPU seconds, wall seconds, the peak of anonymous memory and bytes written."""
    begin, (start, written) = time.monotonic(), figures(process)
    peak = start
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        memory, so_far = figures(process)
        peak, written = max(peak, memory), max(written, so_far)
        time.sleep(0.02)
    if status:
        raise SystemExit(f"a command failed, status {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": time.monotonic() - begin, "anonymous": peak - start, "written": written}


def apply(kind: str, source: Path) -> Row:
    """Convert a checkpoint in a fork."""
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        try:
            os.chdir(source.parent)
            cli.app(["apply", source.name, "out", *KINDS[kind]], standalone_mode=False)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    found = watched(child)
    shutil.rmtree(source.parent / "out")
    return found


def rows_of(work: Path, gigabytes: float, kinds: list[str], hidden: int) -> list[Row]:
    """Measure all kinds on a checkpoint of one size."""
    layers = max(2, round(gigabytes * 1e9 / synthetic_llama.layer_bytes(hidden)))
    size = synthetic_llama.write(work / "source", hidden, layers)
    shape = {"bytes": size, "layers": layers, "hidden": hidden}
    rows = []
    for what in (COPY, *kinds):
        if what == COPY:
            copy = ["cp", "-r", "--reflink=never", str(work / "source"), str(work / "copy")]
            found = watched(os.posix_spawnp(copy[0], copy, os.environ))
            shutil.rmtree(work / "copy")
        else:
            found = apply(what, work / "source")
            found["copies"] = found["cpu"] / rows[0]["cpu"]
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
        "| what | width | weights, GB | layers | CPU s | times a copy | anonymous memory, MB | written, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=lambda row: (row["hidden"], [COPY, *KINDS].index(row["what"]), row["bytes"])):
        cells = [row["what"], row["hidden"], f"{row['bytes'] / 1e9:.2f}", row["layers"], f"{row['cpu']:.1f}"]
        cells += [f"{row['copies']:.1f}" if "copies" in row else ""]
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
    parts = ("# Checkpoints larger than memory", f"`python scripts/bench_scale.py`. {text}", "\n".join(lines))
    return "\n\n".join((*parts, "## Growth", "\n".join(grows), f"{versions}.", ""))


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
                axes[0].plot(x, [row["cpu"] for row in mine], style, label=f"{what}, width {hidden}")
                axes[1].plot(x, [row["anonymous"] / 1e6 for row in mine], style)
    axes[0].set(title="CPU seconds", xlabel="weights, GB", yscale="log")
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
    found = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory(prefix="scale-", dir=".") as folder:
        work = Path(folder).resolve()
        (work / "text.txt").write_text("\n".join(embedded.heldout("prose")))
        if not arguments.render:
            synthetic_llama.write(work / "small", 512, 2, 1 << 20)
            torch.set_num_threads(1)
            cli.app(["apply", str(work / "small"), str(work / "warm"), *KINDS["principal"]], standalone_mode=False)
        for size in () if arguments.render else arguments.gigabytes:
            new = rows_of(work, size, arguments.kinds, arguments.hidden)
            same = {(row["what"], row["bytes"], row["hidden"]) for row in new}
            old = [row for row in found["rows"] if (row["what"], row["bytes"], row["hidden"]) not in same]
            found["rows"] = old + new
            file.write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "README.md").write_text(page(found))
    figure(found, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
