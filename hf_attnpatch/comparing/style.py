"""The style of figures: Okabe and Ito's colours with different markers, on white or dark."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

from ..plotting import import_pyplot

MODELS = {"original": ("#0072B2", "o", "-"), "patched": ("#D55E00", "s", "--")}
ON_DARK = {"original": ("#56B4E9", "o", "-"), "patched": ("#E69F00", "s", "--")}  # the lighter ones of the eight
HEAT = "cividis"  # in order of lightness too, for every kind of colour vision
_INK = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#0d1117", "#e6edf3", "#3d444d")}  # ground, text, grid
THEMES = tuple(_INK)


def marks(theme: str) -> Mapping[str, tuple[str, str, str]]:
    """Colour, marker and line of each model."""
    return MODELS if theme == "light" else ON_DARK


@contextlib.contextmanager
def drawing(theme: str) -> Iterator[Any]:
    """Provide pyplot with a theme.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    pyplot = import_pyplot("drawing a comparison")
    ground, text, grid = _INK[theme]
    look: dict[str, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), text
    )
    look |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), ground)
    look |= {"grid.color": grid, "legend.edgecolor": grid, "legend.labelcolor": text, "font.size": 10}
    with pyplot.rc_context({**look, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}):
        yield pyplot


def png(pyplot: Any, figure: Any) -> bytes:
    """Return a figure as PNG, the same bytes for the same figure, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
