"""What the figures of comparisons share. Colours are Okabe and Ito's, told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_attnpatch.plotting import import_pyplot


def plain(axis: Any) -> None:
    """Numbers such as 0.05 along a logarithmic axis, few enough to be read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def panels(count: int, *, width: float, height: float, sharey: bool) -> tuple[Any, Sequence[Any]]:
    """A row of panels: the figure and its axes; sizes in inches."""
    figure, axes = import_pyplot().subplots(
        1, count, figsize=(width * count + 1, height), sharey=sharey, squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def finish(figure: Any, axes: Sequence[Any], grid: str, title: str) -> None:
    """Grid lines along an axis (`x`, `y` or `both`), no frame, a title."""
    for each in axes:
        each.grid(axis=grid, alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
