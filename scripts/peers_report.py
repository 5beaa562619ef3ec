"""What `compare_peers` found, as tables and a figure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_attnpatch.plotting import import_pyplot

Row = dict[str, Any]
STEPS = (
    *("installs beside the newest transformers", "imports", "patches a Llama", "leaves other models alone"),
    *("runs here, same logits", "can be undone"),
)
WHOLE = "whole cache"


def plain(said: str) -> str:
    """The line that names the error, without addresses and folders of this machine."""
    lines = [line.strip(" |") for line in said.splitlines() if line.strip(" |")]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|ERROR)\b", line)]
    return re.sub(r"(https?:|file:|/)\S*/\S*", "...", (errors or lines)[-1])[:200]


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean with its 95 % bootstrap interval over documents."""
    values = torch.tensor(differences, dtype=torch.float64)
    picks = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[picks].mean(1).sort().values
    return float(values.mean()), float(means[50]), float(means[-51])


def excess(rows: Mapping[str, Row], name: str) -> tuple[float, float, float]:
    """Nats a token beyond the whole cache's, on the same targets."""
    pairs = zip(rows[name]["nats"], rows[WHOLE]["nats"], strict=True)
    return interval([found - whole for found, whole in pairs])


def markdown(found: Mapping[str, Mapping[str, Row]]) -> str:
    """Both tables."""
    parts = [_survive(found["survive"])] if found["survive"] else []
    return "\n\n".join([*parts, *(_cache(name, row) for name, row in found["cache"].items())])


def _survive(rows: Mapping[str, Row]) -> str:
    lines = [f"| project | {' | '.join(STEPS)} |", "| --- " * (len(STEPS) + 1) + "|"]
    notes = []
    for name, row in sorted(rows.items(), key=lambda pair: pair[0] == "hf_attnpatch"):  # this project comes last
        steps = {step["step"]: step for step in row["steps"]}
        failed = next((s for s in STEPS if s in steps and not steps[s]["ok"]), None)
        cells = [_cell(steps.get(step)) for step in STEPS]
        versions = row.get("versions", {})
        label = f"{name} {versions[name]} (transformers {versions['transformers']})" if versions else row["asked"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
        details = {s: re.sub(r" \(from versions:.*", "", steps[s]["detail"]) for s in STEPS if s in steps}
        said = [f"{s}: `{details[s]}`" for s in details if not steps[s]["ok"]]
        notes += [f"* {name}: {'; '.join(said)}"] if failed else []
    return "\n".join([*lines, "", *notes])


def _cell(step: Row | None) -> str:
    return "-" if step is None else "yes" if step["ok"] else "**no**"


def _cache(name: str, row: Row) -> str:
    rows, whole = row["rows"], row["rows"][WHOLE]
    versions = row["versions"]
    about = (
        f"{name}: {row['documents']} documents, {row['prefix']} tokens read, the next {row['targets']} predicted; "
        f"kvpress {versions['kvpress']}, transformers {versions['transformers']}."
    )
    header = ("method", "excess nats", "95 %", "cache after prefix, KiB", "after targets, KiB", "ms a step / whole")
    lines = [about, "", f"| {' | '.join(header)} |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    base = statistics.median(whole["ms"])
    for method in sorted(rows, key=lambda method: excess(rows, method)[0]):
        mean, low, high = excess(rows, method)
        size = f"{rows[method]['bytes'] / 1024:.0f} | {rows[method]['bytes after'] / 1024:.0f}"
        speed = statistics.median(rows[method]["ms"]) / base
        lines.append(f"| {method} | {mean:.3f} | {low:.3f} to {high:.3f} | {size} | {speed:.2f} |")
    return "\n".join(lines)


def page(written: str) -> str:
    """The README of the results' folder."""
    return f"""# Beside the peers

**Presses that keep the latest tokens lose least on this text, and less than shared heads.** They leave the prefix
itself read by the whole model, and cost nothing where the next tokens do not ask for what was dropped, as here. Shared
heads keep every token, go on saving while text is generated (`after targets`), and need nothing beside the model in
decoding. Both can be had at once.

    python scripts/compare_peers.py

{written}

`excess nats`: per token, beyond the same model with its whole cache on the same targets. One step is one token on one
thread, all methods in turns in one process.

![Loss of a cache of the same size](peers.png)
"""


def figure(found: Mapping[str, Row], file: Path) -> None:
    """Excess of every method with its interval, a panel for each model."""
    if not found:
        return
    plt = import_pyplot()
    panels = (figure := plt.figure(figsize=(4.6 * len(found), 4.2), layout="constrained")).subplots(
        1, len(found), squeeze=False
    )
    for axes, (name, row) in zip(panels[0], found.items(), strict=True):
        methods = sorted((m for m in row["rows"] if m != WHOLE), key=lambda m: -excess(row["rows"], m)[0])
        for place, method in enumerate(methods):
            ours = not method.startswith("kvpress")
            mean, low, high = excess(row["rows"], method)
            colour = "#d55e00" if ours else "#0072b2"
            axes.plot([low, high], [place, place], color=colour)
            axes.plot(mean, place, "s" if ours else "o", color=colour)
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.set_xscale("symlog", linthresh=0.05)
        axes.set_xticks([0, 0.05, 0.2, 0.5, 1, 2], ["0", "0.05", "0.2", "0.5", "1", "2"])
        axes.set_xlim(-0.03, 3)
        axes.grid(axis="x", alpha=0.3)
        axes.set(title=name, xlabel="excess nats per token")
    figure.suptitle("A cache of the same bytes: tokens dropped (round) or heads shared (square)")
    figure.savefig(file, dpi=130)
    plt.close(figure)
