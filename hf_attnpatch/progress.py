"""Progress bars for long work, shown where there is a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

T = TypeVar("T")


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items and show how many are done."""
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    if not bar.console.is_terminal:
        yield from items
        return
    with bar:
        yield from bar.track(items, description=what)
