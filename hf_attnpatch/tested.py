"""The tested range of transformers releases, and a warning for newer ones."""

from __future__ import annotations

import functools
import warnings

import transformers
from packaging.version import Version

LOWEST = "5.0"  # the bound in pyproject.toml; CI runs the core tests on it
NEWEST = "5.24.0"  # what constraints.txt pins, written by `make lock`; CI runs every fast test on it


@functools.cache
def warn_if_newer() -> None:
    """Warn once per process if the installed transformers is newer than any tested release.

    Called when a model is first patched or loaded, not on import, so that nobody is warned without using the package.
    """
    if Version(transformers.__version__) > Version(NEWEST):
        warnings.warn(
            f"transformers {transformers.__version__} is newer than the newest that hf_attnpatch was tested with, "
            f"{NEWEST}. What it cannot find there it refuses; `attnpatch doctor` says what works here.",
            stacklevel=3,
        )
