"""Imports matplotlib, only where something is drawn."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

from .errors import MissingExtra, missing_extra


def import_pyplot(purpose: str = "drawing a figure") -> Any:
    """Import pyplot; with the non-interactive backend, unless the caller's process uses pyplot already.

    Args:
        purpose: subject of the sentence in the error message.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", purpose) from error
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def pictures(save: Callable[[IO[bytes]], None]) -> Iterable[bytes]:
    """Return the PNG that a function saves into a file; nothing if matplotlib is not installed."""
    drawn = io.BytesIO()
    try:
        save(drawn)
    except MissingExtra:  # the table says it all
        return ()
    return (drawn.getvalue(),)
