"""Runs the cells without a result, one after another; a failed one does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from recipes.comparison.cells import Cell
from recipes.comparison.store import Store


class CellFailed(RuntimeError):
    """A cell could not be measured; the message, or the output of its process, says why."""


class Runner(Protocol):
    """Measures cells."""

    @property
    def store(self) -> Store:
        """Where results go."""

    def ready(self, cell: Cell) -> Cell:
        """The cell with what it depends on, such as a setting that other cells decide."""

    def run(self, cell: Cell) -> Mapping[str, Any]:
        """Measures a cell and keeps the result; raises `CellFailed`."""


def run(
    runner: Runner, wanted: Sequence[Cell], *, again: bool, said: Callable[[str, Mapping[str, Any]], str]
) -> list[str]:
    """Runs the cells that are not there yet, and says how far it is.

    Args:
        runner: measures a cell.
        wanted: in the order in which they are run.
        again: also those that are there.
        said: a finished cell's name and row in a line.

    Returns:
        The names of those that failed.
    """
    failed = []
    for number, waiting in enumerate(wanted, 1):
        runner.store.reload()
        cell = runner.ready(waiting)
        if runner.store.has(cell) and not again:
            continue
        print(f"[{number}/{len(wanted)}] {cell.name}", flush=True)
        try:
            print(f"    {said(cell.name, runner.run(cell))}", flush=True)
        except CellFailed as error:
            print(f"    FAILED: {error}", flush=True)
            failed.append(cell.name)
    return failed
