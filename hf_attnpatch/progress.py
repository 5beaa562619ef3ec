"""Progress of long work with the remaining time: a bar on a terminal or in a notebook, lines in a log."""

from __future__ import annotations

import importlib.util
import sys
import threading
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
    """Return rich's progress display on stderr, disabled if nobody watches, or a notebook cannot show it."""
    from rich.console import Console  # they take a while to import, which --help need not wait for
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_jupyter and importlib.util.find_spec("ipywidgets") is None:  # it would warn at every bar
        console = Console(stderr=True, force_jupyter=False)
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


class Stages:
    """One display for work of several stages, of which it is known about how long each takes: a context manager.

    Args:
        stages: what is done in each, and its seconds on some machine; how fast this one is shows as stages end.
    """

    def __init__(self, stages: Sequence[tuple[str, float]]) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

        self.stages = stages
        self._now, self._since, self._began = 0, time.monotonic(), time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
        )
        self._bar = bar(*columns, transient=True)
        self._task = self._bar.add_task(self._said(), total=self._seconds(len(stages)), left="")
        self._ended = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Stages:
        self._bar.start()
        self._ticking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._ticking.join()
        self._bar.stop()

    def begin(self, number: int) -> None:
        """Say which stage begins, from 0; those before it are done."""
        self._now, self._since = number, time.monotonic()
        self._show()
        if self._bar.disable and _LINES.get():
            left = f", some {_clock(self.left())} left" if number else ""
            print(f"[{number + 1}/{len(self.stages)}] {self.stages[number][0]}{left}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Return the seconds that the rest will take, if this machine goes on as it did."""
        inside = self.stages[self._now][1] * self._pace() - (time.monotonic() - self._since)
        return max(inside, 1.0) + (self._seconds(len(self.stages)) - self._seconds(self._now + 1)) * self._pace()

    def _pace(self) -> float:
        """How many times longer this machine takes than was said, by the stages that are done."""
        done = self._seconds(self._now)
        return (self._since - self._began) / done if done else 1.0

    def _seconds(self, count: int) -> float:
        return sum(seconds for _, seconds in self.stages[:count])

    def _said(self) -> str:
        return f"[{self._now + 1}/{len(self.stages)}] {self.stages[self._now][0]}"

    def _show(self) -> None:
        total, left = time.monotonic() - self._began + self.left(), self.left()
        self._bar.update(
            self._task,
            description=self._said(),
            total=total,
            completed=total - left,
            left=f"{_clock(left)} left",
        )

    def _tick(self) -> None:
        while not self._ended.wait(0.5):
            self._show()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
