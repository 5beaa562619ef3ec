"""Times pieces of work in turns in one process, and computes ratios of their medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..progress import track

WARM_UP = 3  # rounds that are not counted

Times = dict[Any, list[float]]  # milliseconds of every counted round


def nothing() -> None:
    """Take no time."""


@dataclass(frozen=True)
class Work:
    """What is timed, and what has to happen before and after it without being timed."""

    run: Callable[[], object]
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing


def clock() -> float:
    """Return seconds: CPU time with one thread, else wall time after a CUDA device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(work: Mapping[Any, Work], rounds: int, *, warm_up: int = WARM_UP) -> Times:
    """Return the milliseconds of every piece of work in every round; each round begins with another one."""
    times: Times = {key: [] for key in work}
    keys = list(work)
    for index in track(range(rounds + warm_up), "  rounds".ljust(20), transient=True):
        start = index % len(keys)
        for key in keys[start:] + keys[:start]:
            work[key].before()
            begin = clock()
            work[key].run()
            took = clock() - begin
            work[key].after()
            if index >= warm_up:
                times[key].append(round(1e3 * took, 6))
    return times


def typical(run: Callable[[], object], *, seconds: float = 0.005, repeats: int = 9) -> float:
    """Return the median seconds of one call, over ``repeats`` series that last about ``seconds`` each.

    The median, because what is to be predicted from it runs among the same neighbours.
    """
    run()
    begin = clock()
    run()
    once = clock() - begin
    calls = max(1, min(int(seconds / max(once, 1e-7)), 100_000))
    found = []
    for _ in range(repeats):
        begin = clock()
        for _ in range(calls):
            run()
        found.append((clock() - begin) / calls)
    return statistics.median(found)


def median(times: list[float]) -> float:
    """Return the median."""
    return statistics.median(times)


def ratio(slow: list[float], fast: list[float]) -> tuple[float, list[float]]:
    """Return the ratio of the medians with a 95 % bootstrap interval over rounds."""
    a, b = (torch.tensor(t, dtype=torch.float64) for t in (slow, fast))
    picks = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))  # the same rounds of both
    found = (a[picks].quantile(0.5, 1) / b[picks].quantile(0.5, 1)).sort().values
    return median(slow) / median(fast), [float(found[50]), float(found[-51])]
