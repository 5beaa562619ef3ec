"""Silences transformers and torch while models are tried and configs read."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show no warnings and no progress bars, and do not compile flex attention, which takes a minute or two."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
