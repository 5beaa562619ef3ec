"""Passkeys found by length and depth, a panel for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attnpatch.plotting import import_pyplot
from recipes.comparison.figures import save
from recipes.comparison.store import Store
from recipes.positions.draw import label

COLUMNS = 5  # panels in a row
COLOURS = "cividis"  # of even steps for colour-blind readers, too


def passkeys(store: Store, names: Sequence[str], lengths: Sequence[int], path: Path) -> None:
    """Draws the share of keys found; no file where none was asked for, or no model found any.

    Args:
        store: the results.
        names: of the cells, in the order of the panels.
        lengths: tokens of the prompts, the rows of a panel, the longest below.
        path: where the PNG goes.
    """
    rows = {name: (store.get(name) or {}).get("passkey") for name in names}
    asked: dict[str, Mapping[str, Any]] = {name: found for name, found in rows.items() if found}
    if not any(point for found in asked.values() for each in found.values() for point in each.get("points", [])):
        return
    depths = next(store.rows[name]["spec"]["measure"]["passkey"]["depths"] for name in asked)
    down, across = -(-len(asked) // COLUMNS), min(COLUMNS, len(asked))
    pyplot = import_pyplot()
    size = (2.5 * across + 1, 1.9 * down + 0.9)  # inches
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, grid = pyplot.subplots(down, across, figsize=size, **options)
    for axis in grid.flat[len(asked) :]:
        axis.set_visible(False)
    for axis, (name, found) in zip(grid.flat, asked.items(), strict=False):
        image = _panel(axis, found, depths, lengths)
        axis.set_title(label(name), fontsize=9)
    figure.colorbar(image, ax=list(grid.flat), label="keys found (%)", shrink=0.8)
    figure.supxlabel("depth of the key in the prompt", fontsize=9)
    figure.supylabel("tokens of the prompt", fontsize=9)
    figure.suptitle("Passkeys found")
    save(figure, path)


def _panel(axis: Any, found: Mapping[str, Any], depths: Sequence[float], lengths: Sequence[int]) -> Any:
    missing = [float("nan")] * len(depths)
    points = [found.get(str(length), {}).get("points", missing) for length in lengths]
    image = axis.imshow(points, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    for row, line in enumerate(points):
        for column, value in enumerate(line):
            text, colour = ("-", "black") if value != value else (f"{value:.0f}", "black" if value > 50 else "white")
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    return image
