"""The figures of a comparison, each drawn for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """Loss of the same tokens against context, with intervals over documents."""
    found = tables.losses(metrics)
    assert found is not None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for which, (colour, marker, line) in style.marks(theme).items():
        result = found[which]
        values = [score.nats for score in result.scores]
        axes.plot(result.lengths, values, color=colour, marker=marker, linestyle=line, label=which)
        axes.fill_between(
            result.lengths, [s.low for s in result.scores], [s.high for s in result.scores], color=colour, alpha=0.15
        )
        for score, name, dash in ((result.truncated, "truncated", ":"), (result.sliding, "sliding", "-.")):
            axes.axhline(
                score.nats, color=colour, linestyle=dash, linewidth=1, label=f"{which}, {name} {result.window:,}"
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(found["original"].lengths, [f"{n:,}" for n in found["original"].lengths])
    axes.minorticks_off()
    axes.set(xlabel="context (tokens)", ylabel="loss (nats per token), 95 % interval", title="Loss by context length")
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
    largest = max(*found["alone"], *found["in_place"])
    if largest > 0:
        axes.set_yscale("symlog", linthresh=max(largest * 1e-4, 1e-12))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="layer", ylabel="squared error over variance", title="Attention output, patched against original")
    axes.legend(fontsize=8)
    return figure


# part that it shows -> file, title, what is seen, how it is drawn
FIGURES: tuple[tuple[str, str, str, str, Draw], ...] = (
    (
        "loss",
        "loss_by_length.png",
        "Loss by context length",
        "loss in nats per token of both models against the tokens of context, with two baselines each",
        loss_by_length,
    ),
    (
        "layers",
        "damage_by_layer.png",
        "Damage by layer",
        "error of the output of each attention module, on the original's inputs and in its own model",
        damage_by_layer,
    ),
)


def draw(metrics: Metrics) -> list[Figure]:
    """Draw what was measured.

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
