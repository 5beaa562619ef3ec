"""Matplotlib, imported only where something is drawn."""

from __future__ import annotations

import sys
from typing import Any

from .errors import missing_extra


def import_pyplot(purpose: str = "drawing a figure") -> Any:
    """Import pyplot; with the backend that needs no screen, unless the caller's process uses pyplot already.

    Args:
        purpose: what it is for, the subject of the error's sentence.

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
