"""Progress of long work with the remaining time: a bar on a terminal or in a notebook, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

FIRST, EVERY = 10.0, 30.0  # seconds until the first line of a log, and between two
_LINES: ContextVar[bool] = ContextVar("lines", default=False)  # where there is no terminal
_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def spoken(aloud: bool) -> Iterator[None]:
    """Report the progress of long work in the block, even without a terminal; or silence it."""
    lines, silent = _LINES.set(aloud), _SILENT.set(not aloud)
    try:
        yield
    finally:
        _LINES.reset(lines)
        _SILENT.reset(silent)


def is_silent() -> bool:
    """Return whether progress is silenced."""
    return _SILENT.get()


def bar(*columns: Any, **options: Any) -> Any:
    """Return rich's progress display on stderr, disabled if nobody watches."""
    from rich.console import Console  # they take a while to import, which --help need not wait for
    from rich.progress import Progress

    console = Console(stderr=True)
    seen = (console.is_terminal or console.is_jupyter) and not is_silent()
    return Progress(*columns, console=console, disable=not seen, **options)


def track(items: Sequence[T], what: str, **options: Any) -> Iterator[T]:
    """Yield the items, and show how many are done and the remaining time.

    Args:
        items: done one after another.
        what: is done with them, for the display.
        options: of rich's ``Progress``.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    shown = bar(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), **options)
    if shown.disable:
        yield from _logged(items, what) if _LINES.get() else items
        return
    with shown:
        yield from shown.track(items, description=what)


def _logged(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items, and print progress to stderr now and then."""
    began, due = time.monotonic(), FIRST
    for done, item in enumerate(items, 1):
        yield item
        passed = time.monotonic() - began
        if passed >= due and done < len(items):
            left = passed / done * (len(items) - done)
            print(f"{what}: {done} of {len(items)}, some {_clock(left)} left", file=sys.stderr, flush=True)
            due = passed + EVERY


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
