"""Evolution of the divisors of rotary frequencies: seeds, mutation and crossover that keep them monotone (2402.13753).

Pure Python, so that a seed gives the same search on every machine that computes the same losses.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise

from torch import Tensor

from ..functional import rotary

Divisors = tuple[float, ...]  # one for each frequency, at least 1, non-decreasing
TRIES = 20
SHARE = 0.3  # share of the frequencies that a mutation changes


def seeds(frequencies: Tensor, factor: float, trained: int) -> dict[str, Divisors]:
    """Return the seeds of the search: position interpolation, NTK and YaRN.

    Args:
        frequencies: the model's, in radians per position, highest first.
        factor: target over trained length.
        trained: tokens.
    """
    known = {
        "linear": rotary.linear(frequencies, factor),
        "ntk": rotary.ntk(frequencies, factor),
        "yarn": rotary.by_parts(frequencies, factor, trained),
    }
    return {name: rounded((frequencies.double() / found.double()).tolist()) for name, found in known.items()}


def mutated(
    parent: Divisors, seen: Collection[Divisors], chance: random.Random, step: float, largest: float
) -> Divisors | None:
    """Return a child with some divisors redrawn between their neighbours, or None if none was found.

    Args:
        parent: monotone divisors.
        seen: divisors that were evaluated already.
        chance: source of random numbers.
        step: of the grid of divisors.
        largest: largest divisor.
    """
    for _ in range(TRIES):
        child = list(parent)
        for i in range(len(child)):
            if chance.random() < SHARE:
                low = child[i - 1] if i else 1.0
                high = child[i + 1] if i + 1 < len(child) else largest
                child[i] = low + step * chance.randint(0, max(0, int((high - low) / step)))
        found = rounded(child)
        if found not in seen and monotone(found):
            return found
    return None


def crossed(first: Divisors, second: Divisors, seen: Collection[Divisors], chance: random.Random) -> Divisors | None:
    """Return the first with some divisors of the second, or None if no such child is monotone and new."""
    for _ in range(TRIES):
        found = tuple(b if chance.random() < SHARE else a for a, b in zip(first, second, strict=True))
        if found not in seen and monotone(found):
            return found
    return None


def monotone(divisors: Divisors) -> bool:
    """Return whether no frequency is divided by less than a higher one."""
    return all(a <= b for a, b in pairwise(divisors))


def rounded(values: list[float]) -> Divisors:
    """Return values as divisors: at least 1, few digits."""
    return tuple(round(max(1.0, value), 6) for value in values)
