"""The drawings of README and pages, from committed results: `hf_attnpatch/docs/figures/*.svg`.

One colour for one method everywhere; text stays text, so that it can be searched and compared with the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from facts import grouped_excess, nats, peer_excess, result
from readme import DOCS

OUT = DOCS / "figures"
OURS, OTHERS, WITHOUT = "#d55e00", "#8a8a8a", "#444444"
LINES = {
    "original": ("unpatched", "#444444"),
    "yarn": ("YaRN", "#0072b2"),
    "dynamic_yarn": ("YaRN for each request", "#56b4e9"),
    "self_extend": ("SelfExtend", "#d55e00"),
    "re_rope": ("ReRope", "#009e73"),
    "dual_chunk": ("DualChunk", "#cc79a7"),
    "jet_long": ("JetLong", "#e69f00"),
    "attention_sinks": ("AttentionSinks", "#999999"),
}


def draw(only: Sequence[str] = ()) -> None:
    """Draws all figures, or some, by name."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "attnpatch", "font.family": "DejaVu Sans", "font.size": 10}
    OUT.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        if not only or name in only:
            with mpl.rc_context({**style, "axes.spines.top": False, "axes.spines.right": False}):
                make(OUT / f"{name}.svg")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, facecolor="white", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    lines = file.read_text("utf-8").splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", "utf-8")


def _bars(axes: Any, rows: Sequence[tuple[str, float, str]], title: str, label: str) -> None:
    """Horizontal bars with their values, best last."""
    names, values, colours = zip(*rows, strict=True)
    axes.barh(range(len(rows)), values, color=colours, height=0.62)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    for place, value in enumerate(values):
        axes.annotate(f"{value:.2f}", (max(value, 0), place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.14 * max(values))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(label)
    axes.tick_params(axis="y", length=0)


def front(file: Path) -> None:
    """A smaller cache and a longer context: what each way loses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
    heads = [
        ("averaged heads", peer_excess("8-2", "grouped query, mean"), OTHERS),
        ("principal", peer_excess("8-2", "grouped query, principal"), OURS),
        ("calibrated", peer_excess("8-2", "grouped query, calibrated"), OURS),
        ("refined", peer_excess("8-2", "grouped query, refined"), OURS),
    ]
    _bars(left, heads, "A quarter of the cache", "nats per token above the original")
    rows = result("extend_context_smollm2/metrics.jsonl")
    far = {
        name: nats(rows[name]["lengths"]["16384"]["losses"]) for name in ("original", "linear", "yarn", "self_extend")
    }
    contexts = [
        ("unpatched", far["original"], WITHOUT),
        ("linear scaling", far["linear"], OTHERS),
        ("YaRN", far["yarn"], OTHERS),
        ("SelfExtend", far["self_extend"], OURS),
    ]
    _bars(right, contexts, "Twice the trained context, no training", "nats per token at 16,384 tokens")
    _save(figure, file)


def grouped(file: Path) -> None:
    """Excess loss of every method, for three sizes of the cache."""
    methods = ("mean", "procrustes", "principal", "calibrated", "refined")
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
    for panel, (cells, title) in zip(
        axes,
        (
            ("embedded/8-4", "embedded, 8 to 4"),
            ("embedded/8-2", "embedded, 8 to 2"),
            ("smollm2/3-1", "SmolLM2, 3 to 1"),
        ),
        strict=True,
    ):
        ours = ("principal", "calibrated", "refined")
        rows = [(m, grouped_excess(f"{cells}/{m}"), OURS if m in ours else OTHERS) for m in methods]
        _bars(panel, rows, title, "nats above the original")
    _save(figure, file)


def contexts(file: Path) -> None:
    """Loss against length, by method, of the embedded model that was trained at 512."""
    rows = result("extend_context/metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    lengths = [512, 1024, 2048]
    for cell, (label, colour) in LINES.items():
        losses = [nats(rows[cell]["lengths"][str(n)]["losses"]) for n in lengths]
        axes.plot(lengths, losses, "o-", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xlabel("tokens of context (the model was trained at 512)")
    axes.set_ylabel("nats per token, the same last tokens")
    axes.legend(frameon=False)
    _save(figure, file)


def passkeys(file: Path) -> None:
    """Passkeys found at four times the trained context."""
    rows = result("extend_context_passkey/metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7.2, 3), layout="constrained")
    cells = [cell for cell in LINES if cell in rows]
    found = [rows[cell]["passkey"]["2048"]["mean"][0] for cell in cells]
    axes.barh(range(len(cells)), found, color=[LINES[cell][1] for cell in cells], height=0.62)
    axes.set_yticks(range(len(cells)), [LINES[cell][0] for cell in cells])
    axes.invert_yaxis()
    for place, value in enumerate(found):
        axes.annotate(f"{value:.0f} %", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 100)
    within = rows["original"]["passkey"]["512"]["mean"][0]
    axes.set_xlabel(f"% of passkeys found at 2,048 tokens ({within:.0f} % within the trained 512)")
    _save(figure, file)


def switches(file: Path) -> None:
    """Loss before and after a short training, by new positions."""
    rows = result("switch_positions/metrics.jsonl")
    names = {"original": "kept", "relative": "RelativeXl", "alibi": "Alibi", "none": "NoPosition"}
    figure, axes = plt.subplots(figsize=(7.2, 2.8), layout="constrained")
    for place, name in enumerate(names):
        for offset, stage, colour in ((-0.18, "", OTHERS), (0.18, "/trained", OURS)):
            value = nats(rows[f"rope/{name}{stage}"]["lengths"]["512"]["losses"])
            axes.barh(place + offset, value, height=0.34, color=colour)
            axes.annotate(
                f"{value:.2f}", (value, place + offset), xytext=(4, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 5.2)
    axes.set_xlabel("nats per token at 512; grey: switched, orange: after 0.2 M tokens of training")
    _save(figure, file)


def recurrence(file: Path) -> None:
    """Loss by segments in memory, before any training."""
    figure, axes = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
    names = {"embedded": "embedded, segments of 128", "smollm2": "SmolLM2, segments of 512"}
    names["smollm2_sinks"] = "SmolLM2, 4 first tokens kept"
    for (name, label), colour in zip(names.items(), ("#0072b2", "#8a8a8a", "#d55e00"), strict=True):
        rows = result(f"recurrence/train_recurrent_{name}.json")["memory_segments"]
        axes.plot(
            [int(n) for n in rows], [row["before"]["nats"] for row in rows.values()], "o-", color=colour, label=label
        )
    axes.set_xticks([0, 1, 3])
    axes.set_xlabel("segments in memory")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False)
    _save(figure, file)


TRAINED, SHOWN = 16, 48  # tokens of the model in the drawing, and of the text that it reads


def distances(query: Any, key: Any) -> dict[str, Any]:
    """At which distance each method shows a key to a query of a model trained at 16 tokens; NaN where it shows none."""
    gap = query - key
    plain = query < TRAINED

    def beyond(window: int, far: Any) -> Any:
        return np.where(plain | (gap < window), gap, far)

    group = query // TRAINED + 1
    place, apart = key % 12, query // 12 - key // 12
    chunks = np.select([apart == 0, apart == 1], [gap, np.minimum(query % 12 + 12, 16) - place], 16 - place)
    kept = np.where(gap < 14, gap, np.where(key < 2, np.minimum(query, 15) - key, np.nan))
    return {
        "unpatched": gap,
        "SelfExtend": beyond(8, query // 5 - key // 5 + 8 - 8 // 5),
        "ReRope": beyond(8, 8),
        "DualChunk": np.where(plain, gap, chunks),
        "JetLong": np.where(gap <= 4, gap, query // group - key // group),
        "AttentionSinks": kept,
    }


def seen(file: Path) -> None:
    """Which distances a query meets: known ones in colour, unknown ones in red."""
    query, key = np.meshgrid(np.arange(SHOWN), np.arange(SHOWN), indexing="ij")
    figure, axes = plt.subplots(1, 6, figsize=(10.8, 2.4), layout="constrained", sharey=True)
    colours = plt.get_cmap("cividis").with_extremes(over="#d62728", bad="#e8e8e8")
    for panel, (name, far) in zip(axes, distances(query, key).items(), strict=True):
        shown = np.where(key > query, np.nan, far).astype(float)
        image = panel.imshow(shown, cmap=colours, vmin=0, vmax=TRAINED, interpolation="nearest")
        panel.set_title(name, fontsize=10)
        panel.set_xticks([0, 16, 32], ["0", "16", "32"])
        panel.set_yticks([0, 16, 32], ["0", "16", "32"])
    axes[0].set_ylabel("query")
    figure.supxlabel("key; red: a distance beyond the 16 tokens that the model was trained at", fontsize=9)
    figure.colorbar(image, ax=list(axes), label="distance", shrink=0.9)
    _save(figure, file)


def kernels(file: Path) -> None:
    """Time of a prompt of 8,192 tokens, stock and fused."""
    rows = [row for row in result("alibi/bench_alibi.json")["prefill"] if row["length"] == 8192]
    figure, axes = plt.subplots(figsize=(7.2, 1.9), layout="constrained")
    names = {"bloom": "BLOOM", "mpt": "MPT"}
    bars = [
        (f"{names[row['family']]}, {label}", row["seconds"][way]["cpu"], colour)
        for row in rows
        for label, way, colour in (("stock", "stock", OTHERS), ("Flash", "fused", OURS))
    ]
    _bars(axes, bars, "One layer of width 1,024 reads 8,192 tokens", "CPU seconds")
    _save(figure, file)


FIGURES: dict[str, Callable[[Path], None]] = {
    "front": front,
    "grouped": grouped,
    "contexts": contexts,
    "passkeys": passkeys,
    "switches": switches,
    "recurrence": recurrence,
    "seen": seen,
    "kernels": kernels,
}
