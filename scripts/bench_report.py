"""Renders the results of `bench_apply` as tables, a figure and the README's part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_attnpatch.plotting import import_pyplot

Row = dict[str, Any]

NOTE = """\
`copy`: a clone of the replaced weights. `weights`: making and setting the new ones; `plan` and `self-check` (the
first layers, one of each kind, read and decode 16 tokens; all layers read two) come on top. `peak extra`: resident
memory during `apply` above that before it; `transient`: what of it is gone when `apply` returns. The report still holds
the old weights; `after report` is when it was dropped."""


def table(title: str, rows: list[Row]) -> Table:
    """Rows as a table; numbers with three digits."""
    found = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        found.add_row(*[_text(value) for value in row.values()])
    return found


def _text(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(f"{v:.3f}" for v in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def figure(found: Mapping[str, list[Row]], file: Path) -> None:
    """The ratios with their intervals, and `apply` by its parts beside twice the copy."""
    plt = import_pyplot()
    left, right = (figure := plt.figure(figsize=(9.2, 3.6), layout="constrained")).subplots(1, 2)
    for place, row in enumerate(found["forward"]):
        left.plot(row["interval"], [place, place], color="tab:blue")
        left.plot(row["ratio"], place, "o", color="tab:blue")
    left.axvline(1.01, color="tab:red", linestyle=":", label="1.01")
    left.set_yticks(range(len(found["forward"])), [row["what"] for row in found["forward"]])
    left.set(title="forward of the patched model", xlabel="time relative to the other model, 95 % interval")
    left.legend()
    for place, row in enumerate(found["apply"]):
        start = 0.0
        for part, colour in zip(("weights", "plan", "self-check"), ("tab:blue", "tab:orange", "0.7"), strict=True):
            right.barh(place, row[f"{part} ms"], left=start, color=colour, label=None if place else part)
            start += row[f"{part} ms"]
        right.plot([2 * row["copy ms"]] * 2, [place - 0.4, place + 0.4], color="tab:red", linestyle=":")
    right.set_yticks(range(len(found["apply"])), [row["what"] for row in found["apply"]])
    right.set(title="apply by its parts", xlabel="CPU time, ms; dotted: twice a copy of the replaced weights")
    right.legend()
    figure.savefig(file, dpi=130)


def markdown(found: Mapping[str, Any]) -> str:
    """The README's part: the same figures, fewer columns."""
    versions = found["versions"]
    lines = [f"CPU time of one thread, fp32, torch {versions['torch']}, transformers {versions['transformers']}.", ""]
    lines += [
        "| forward, GroupedQuery 8 -> 2 | patched, ms | other, ms | ratio | 95 % |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for row in found["forward"]:
        ms = f"{row['patched ms']:.1f} | {row['other ms']:.1f}"
        lines.append(f"| {row['what']} | {ms} | {row['ratio']:.3f} | {_text(row['interval'])} |")
    names = ("replaced MiB", "copy ms", "weights ms", "plan ms", "self-check ms", "apply ms", "weights / copy")
    lines += ["", f"| apply | {' | '.join(names)} |", "| --- " + "| ---: " * len(names) + "|"]
    lines += [f"| {row['what']} | " + " | ".join(f"{row[n]:.1f}" for n in names) + " |" for row in found["apply"]]
    names = ("old weights MiB", "new weights MiB", "peak extra MiB", "transient MiB", "after report MiB")
    lines += ["", f"| memory | {' | '.join(names)} |", "| --- " + "| ---: " * len(names) + "|"]
    lines += [f"| {row['what']} | " + " | ".join(f"{row[n]:.1f}" for n in names) + " |" for row in found["memory"]]
    return "\n".join([*lines, "", NOTE])
