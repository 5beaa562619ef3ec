"""Imports matplotlib, only where something is drawn."""

from __future__ import annotations

import sys
from typing import Any

from .errors import missing_extra


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
