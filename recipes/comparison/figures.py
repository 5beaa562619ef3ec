"""Common parts of the figures of comparisons. Colours are Okabe and Ito's, for colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attnpatch.plotting import import_pyplot


def plain(axis: Any) -> None:
    """Numbers such as 0.05 along a logarithmic axis, few enough to be read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


WIDEST = 1200  # pixels: wider ones are shrunk by a page, and their letters with them


def panels(count: int, *, width: float, height: float, sharey: bool) -> tuple[Any, Sequence[Any]]:
    """Panels, two in a row: the figure and its axes; sizes in inches."""
    across, down = min(count, 2), -(-count // 2)
    figure, axes = import_pyplot().subplots(
        down, across, figsize=(width * across + 1, height * down), sharey=sharey, squeeze=False, layout="constrained"
    )
    for idle in axes.flat[count:]:
        idle.remove()
    return figure, list(axes.flat[:count])


def save(figure: Any, path: Path) -> None:
    """Writes a PNG that is not too wide for a page, and closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=min(130, int(WIDEST / figure.get_figwidth())))
    import_pyplot().close(figure)


def finish(figure: Any, axes: Sequence[Any], grid: str, title: str) -> None:
    """Grid lines along an axis (`x`, `y` or `both`), no frame, a title."""
    for each in axes:
        each.grid(axis=grid, alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
