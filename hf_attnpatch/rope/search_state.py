"""A search for divisors as a file: written after every evaluation, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AttnPatchError
from .evolution import Divisors


@dataclass
class State:
    """Where a search stands.

    Attributes:
        settings: what decides its course; a file of other settings is refused.
        file: where it is kept, or None.
        losses: of all divisors that were evaluated, in order.
        settled: how many of those were there when the present iteration began.
        iteration: that is under way; 0 fills the first population.
        population: best first.
        chance: source of numbers, as it was when the iteration began.
    """

    settings: dict[str, Any]
    file: Path | None
    losses: dict[Divisors, float] = field(default_factory=dict)
    settled: int = 0
    iteration: int = 0
    population: list[Divisors] = field(default_factory=list)
    chance: random.Random = field(default_factory=random.Random)

    def note(self, divisors: Divisors, loss: float) -> None:
        """Remember a loss."""
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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = self.file.with_name(self.file.name + ".part")
        aside.write_text(json.dumps(data), "utf-8")
        os.replace(aside, self.file)


def opened(settings: dict[str, Any], seed: int, file: Path | None) -> State:
    """Return the state that a file holds, or a new one.

    Args:
        settings: of the search; numbers that were ``None`` are taken from the file.
        seed: of a new one.
        file: may not be there yet; None for a search that is not kept.

    Raises:
        AttnPatchError: the file is of another search, or no such file.
    """
    state = State(settings, file, chance=random.Random(seed))  # noqa: S311 - no secret
    if file is None or not file.exists():
        return state
    try:
        data = json.loads(file.read_text("utf-8"))
        state.losses = {tuple(each): float(loss) for each, loss in data["losses"]}
        state.population = [tuple(each) for each in data["population"]]
        state.iteration, state.settled = int(data["iteration"]), int(data["settled"])
        version, numbers, gauss = data["random"]
        state.chance.setstate((version, tuple(numbers), gauss))
        state.began = state.chance.getstate()
        found: Mapping[str, Any] = data["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise AttnPatchError(f"{file}: no state of a search ({type(error).__name__}: {error}); delete it.") from error
    other = [name for name, value in settings.items() if value is not None and found.get(name) != value]
    if other:
        name = other[0]
        raise AttnPatchError(
            f"{file}: is of a search with {name} {found.get(name)!r:.60}, wanted {settings[name]!r:.60}; name another "
            "file, or delete it."
        )
    state.settings = dict(found)
    return state
