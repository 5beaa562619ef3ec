"""The state of a search as a file, written after every evaluation, so that an interrupted search can continue."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AttnPatchError
from ..schema import brief, fields_of, from_json, text_of
from ..writing import write
from .evolution import Divisors

_MOST = 1_000_000  # largest population and number of iterations in a file


@dataclass
class State:
    """The present state of a search.

    Attributes:
        settings: determine the course; a file with other settings is refused.
        file: where it is stored, or None.
        losses: of all divisors that were evaluated, in order.
        settled: how many losses there were when the present iteration began.
        iteration: the present one; 0 fills the first population.
        population: best first.
        chance: source of random numbers, as it was when the iteration began.
    """

    settings: dict[str, Any]
    file: Path | None
    losses: dict[Divisors, float] = field(default_factory=dict)
    settled: int = 0
    iteration: int = 0
    population: list[Divisors] = field(default_factory=list)
    chance: random.Random = field(default_factory=random.Random)

    def note(self, divisors: Divisors, loss: float) -> None:
        """Store a loss."""
        self.losses[divisors] = loss
        self._write()

    def settle(self, population: list[Divisors]) -> None:
        """End an iteration."""
        self.population, self.iteration, self.settled = population, self.iteration + 1, len(self.losses)
        self.began = self.chance.getstate()
        self._write()

    def __post_init__(self) -> None:
        self.began = self.chance.getstate()

    def _write(self) -> None:
        if self.file is None:
            return
        version, numbers, gauss = self.began
        data = {
            "settings": self.settings,
            "iteration": self.iteration,
            "settled": self.settled,
            "random": [version, list(numbers), gauss],
            "population": [list(each) for each in self.population],
            "losses": [[list(each), loss] for each, loss in self.losses.items()],
        }
        write(self.file, json.dumps(data))


@dataclass(frozen=True)
class _Kept:
    """A state as stored in its file."""

    settings: dict[str, Any]
    iteration: int
    settled: int
    random: tuple[int, tuple[int, ...], float | None]
    population: tuple[Divisors, ...]
    losses: tuple[tuple[Divisors, float], ...]


def _check(data: _Kept, where: str) -> None:
    """Check that a state is consistent.

    Raises:
        AttnPatchError: names the inconsistency.
    """
    size, rounds = (data.settings.get(name, 8) for name in ("population", "iterations"))
    tried = dict(data.losses)
    widths = {len(each) for each in (*tried, *data.population)}
    numbers = [*(number for each in tried for number in each)]
    for right, wanted in (
        (all(isinstance(n, int) and not isinstance(n, bool) for n in (size, rounds)), "whole numbers as its size"),
        (len(tried) == len(data.losses), "no divisors twice"),
        (0 <= data.settled <= len(tried), "settled of 0 to the number of losses"),
        (len(widths) <= 1 and 0 not in widths, "as many divisors in each set"),
        (min(numbers, default=1) >= 1, "divisors of 1 or more"),
        (set(data.population) <= set(tried), "a population of which the losses are there"),
        ((data.iteration > 0) == bool(data.population) and data.iteration >= 0, "a population after each iteration"),
        (not data.population or len(data.population) > 1, "a population of two or more"),
        (all(0 <= number < 1 << 32 for number in data.random[1]), "random numbers of 32 bits"),
    ):
        if not right:
            raise AttnPatchError(f"{where}: does not hold together; wanted {wanted}.")
    if not (8 <= size <= _MOST and 1 <= rounds <= _MOST):
        said = f"population {brief(size)}, iterations {brief(rounds)}"
        raise AttnPatchError(f"{where}: {said}; wanted at least 8 and 1, at most {_MOST:,}.")


def opened(settings: dict[str, Any], seed: int, file: Path | None) -> State:
    """Return the state in a file, or a new one.

    Args:
        settings: of the search; numbers that are ``None`` are read from the file.
        seed: for a new state.
        file: may not exist yet; None for a search without a file.

    Raises:
        AttnPatchError: the file belongs to another search, or is no state.
    """
    state = State(settings, file, chance=random.Random(seed))  # noqa: S311 - no secret
    if file is None or not file.exists():
        return state
    try:
        data = fields_of(_Kept, from_json(text_of(file), str(file)), str(file))
        _check(data, str(file))
        state.chance.setstate(data.random)
    except (TypeError, ValueError, OverflowError) as error:  # what Python refuses as a state of its random numbers
        problem = brief(str(error).rstrip("."), 300)
        raise AttnPatchError(f"{problem}: no state of a search; delete it.") from error
    state.losses, state.population = dict(data.losses), list(data.population)
    state.iteration, state.settled, state.began = data.iteration, data.settled, state.chance.getstate()
    found: Mapping[str, Any] = data.settings
    other = [name for name, value in settings.items() if value is not None and found.get(name) != value]
    if other:
        name = other[0]
        raise AttnPatchError(
            f"{file}: is of a search with {name} {brief(found.get(name), 60)}, wanted {brief(settings[name], 60)}; "
            "name another file, or delete it."
        )
    state.settings = dict(found)
    return state
