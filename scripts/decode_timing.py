"""Pieces of work timed in turns in one process, and ratios of their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

WARM_UP = 3  # rounds that are not counted

PRODUCT_OPERATIONS = 2 * 1024**3  # a multiplication and an addition are two

Times = dict[Any, list[float]]  # milliseconds of every counted round


def nothing() -> None:
    """Takes no time."""


@dataclass(frozen=True)
class Work:
    """What is timed, and what must happen before and after it that is not."""

    run: Callable[[], object]
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing


def clock() -> float:
    """Seconds: CPU time where one thread does everything, else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(work: Mapping[Any, Work], rounds: int) -> Times:
    """Milliseconds of every piece of work in every round; each round begins with another one."""
    times: Times = {key: [] for key in work}
    keys = list(work)
    for index in track(range(rounds + WARM_UP), "  rounds".ljust(20), console=Console(stderr=True), transient=True):
        start = index % len(keys)
        for key in keys[start:] + keys[:start]:
            work[key].before()
            begin = clock()
            work[key].run()
            took = clock() - begin
            work[key].after()
            if index >= WARM_UP:
                times[key].append(round(1e3 * took, 6))
    return times


def median(times: list[float]) -> float:
    """The median."""
    return statistics.median(times)


def ratio(slow: list[float], fast: list[float]) -> tuple[float, list[float]]:
    """Ratio of the medians with a 95 % bootstrap interval over rounds."""
    a, b = (torch.tensor(t, dtype=torch.float64) for t in (slow, fast))
    picks = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))  # the same rounds of both
    found = (a[picks].quantile(0.5, 1) / b[picks].quantile(0.5, 1)).sort().values
    return median(slow) / median(fast), [float(found[50]), float(found[-51])]


def readers(mib: int) -> dict[Any, Work]:
    """What reads a buffer of so many MiB once, by torch's own loops."""
    buffer = torch.randn(mib * 2**18)
    half = len(buffer) // 2
    return {"sum": Work(buffer.sum), "dot": Work(lambda: torch.dot(buffer[:half], buffer[half:]))}


def product(dtype: torch.dtype) -> dict[Any, Work]:
    """A large matrix product of `PRODUCT_OPERATIONS`."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return {"product": Work(lambda: a @ b)}
