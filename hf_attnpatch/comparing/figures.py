"""The figures of a comparison, each drawn for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import showing
from ..evaluation import difference
from . import style, tables
from .tables import Metrics


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        file: its PNG.
        title: above it.
        alt: what it shows, for those who do not see it.
        drawn: theme -> PNG.
    """

    file: str
    title: str
    alt: str
    drawn: Mapping[str, bytes]


Draw = Callable[[Any, Metrics, str], Any]  # pyplot, metrics, theme -> figure


def loss_by_length(pyplot: Any, metrics: Metrics, theme: str) -> Any:
    """Loss of the same tokens against context; below, the paired difference with its interval over documents."""
    found = tables.losses(metrics)
    assert found is not None
    shape: dict[str, Any] = {"sharex": True, "height_ratios": (3, 2), "layout": "constrained"}
    figure, (axes, below) = pyplot.subplots(2, 1, figsize=(7, 5.4), **shape)
    lengths = found["original"].lengths
    for which, (colour, marker, line) in style.marks(theme).items():
        result = found[which]
        values = [score.nats for score in result.scores]
        axes.plot(lengths, values, color=colour, marker=marker, linestyle=line, label=which)
        for score, name, dash in ((result.truncated, "truncated", ":"), (result.sliding, "sliding", "-.")):
            axes.axhline(
                score.nats, color=colour, linestyle=dash, linewidth=1, label=f"{which}, {name} {result.window:,}"
            )
    gaps = [difference(*both) for both in zip(found["original"].scores, found["patched"].scores, strict=True)]
    colour, marker, _ = style.marks(theme)["patched"]
    values = [gap.value for gap in gaps]
    bars = [[gap.value - gap.low for gap in gaps], [gap.high - gap.value for gap in gaps]]
    below.errorbar(lengths, values, yerr=bars, color=colour, marker=marker, capsize=4, linestyle="none")
    below.axhline(0, color=style.marks(theme)["original"][0], linewidth=1)
    below.set_xscale("log", base=2)
    below.set_xticks(lengths, [f"{n:,}" for n in lengths])
    below.minorticks_off()
    below.set(xlabel="context (tokens)", ylabel="patched - original\n(95 %, paired)")
    axes.set(ylabel="loss (nats per token)", title="Loss by context length")
    axes.legend(fontsize=8)
    return figure


def damage_by_layer(pyplot: Any, metrics: Metrics, theme: str) -> Any:
    """Error of each attention module, alone and in place."""
    found = metrics["parts"]["layers"]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    at = range(len(found["paths"]))
    colours = style.marks(theme)
    for name, label, which in (
        ("alone", "alone: on the original's inputs", "patched"),
        ("in_place", "in place: with the error of the layers before", "original"),
    ):
        colour, marker, line = colours[which]
        axes.plot(at, found[name], color=colour, marker=marker, linestyle=line, label=label)
    values = [*found["alone"], *found["in_place"]]
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="layer", ylabel="squared error over variance", title="Attention output, patched against original")
    axes.legend(fontsize=8)
    return figure


def retrieval_map(pyplot: Any, metrics: Metrics, theme: str) -> Any:
    """Score by length and depth, a panel for each model; the numbers are written in."""
    found = tables.retrievals(metrics)
    assert found is not None
    first = found["original"]
    figure, panels = pyplot.subplots(
        1, 2, figsize=(8, 1.8 + 0.45 * len(first.lengths)), layout="constrained", sharey=True
    )
    for axes, which in zip(panels, tables.BOTH, strict=True):
        grid = found[which].grid()
        image = axes.imshow(grid, cmap=style.HEAT, vmin=0, vmax=100, aspect="auto")
        for row, scores in enumerate(grid):
            for column, score in enumerate(scores):
                ink = "black" if score > 55 else "white"
                axes.text(column, row, f"{score:.0f}", ha="center", va="center", color=ink, fontsize=9)
        depths = ["all" if depth is None else f"{depth:.0%}" for depth in first.depths]
        axes.set_xticks(range(len(depths)), depths)
        axes.set_yticks(range(len(first.lengths)), [f"{n:,}" for n in first.lengths])
        axes.grid(visible=False)
        axes.set(title=which, xlabel="depth of the needle")
    panels[0].set_ylabel("prompt (tokens)")
    figure.colorbar(image, ax=list(panels), label="score, of 100")
    task = showing.line(first.task, 60).replace("$", r"\$")  # between dollars it would be mathematics
    figure.suptitle(f"Retrieval: {task}")
    return figure


def speed_and_cache(pyplot: Any, metrics: Metrics, theme: str) -> Any:
    """Decoding speed beside what the memory allows, and the cache, against context."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for which, (colour, marker, line) in style.marks(theme).items():
        rows = metrics["parts"]["decoding"][which]["rows"]
        at = [row["context"] for row in rows]
        look = {"color": colour, "marker": marker, "label": which}
        left.plot(at, [row["decode_tokens_per_second"] for row in rows], linestyle=line, **look)
        limit = [row["decode_limit"] for row in rows]
        left.plot(at, limit, color=colour, linestyle=":", linewidth=1, label=f"{which}, limit of the memory")
        right.plot(at, [row["cache_bytes"] / 1e6 for row in rows], linestyle=line, **look)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{n:,}" for n in at])
        axes.minorticks_off()
        axes.set(xlabel="context (tokens)", ylim=(0, None))
        axes.legend(fontsize=8)
    left.set(ylabel="tokens per second", title="Decoding, one sequence")
    right.set(ylabel="MB", title="Cache")
    return figure


# part that it shows -> file, title, what is seen, how it is drawn
FIGURES: tuple[tuple[str, str, str, str, Draw], ...] = (
    (
        "loss",
        "loss_by_length.png",
        "Loss by context length",
        "loss in nats per token of both models against the context, with two baselines each; and paired differences",
        loss_by_length,
    ),
    (
        "layers",
        "damage_by_layer.png",
        "Damage by layer",
        "error of the output of each attention module, on the original's inputs and in its own model",
        damage_by_layer,
    ),
    (
        "retrieval",
        "retrieval.png",
        "Retrieval",
        "score by length of the prompt and depth of the needle, a panel for each model",
        retrieval_map,
    ),
    (
        "decoding",
        "speed_and_cache.png",
        "Speed and cache",
        "tokens per second while decoding and megabytes of cache of both models against the tokens of context",
        speed_and_cache,
    ),
)


def draw(metrics: Metrics) -> list[Figure]:
    """Draw the figures of what was measured.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    return [
        Figure(file, title, alt, {theme: _drawn(how, metrics, theme) for theme in style.THEMES})
        for part, file, title, alt, how in FIGURES
        if part in metrics["parts"]
    ]


def _drawn(how: Draw, metrics: Metrics, theme: str) -> bytes:
    with style.drawing(theme) as pyplot:
        return style.png(pyplot, how(pyplot, metrics, theme))
