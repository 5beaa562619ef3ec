"""The course of a search: which divisors are evaluated, in which order, with a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..progress import bar
from .evolution import TRIES, Divisors, crossed, mutated
from .state import State


@dataclass
class Course:
    """The course of a search.

    Attributes:
        state: present state of the search.
        loss: returns the loss of divisors.
        start: the seeds.
        step: of the grid.
        largest: largest divisor.
    """

    state: State
    loss: Callable[[Divisors], float]
    start: list[Divisors]
    step: float
    largest: float

    def size(self, population: int, iterations: int, minutes: float | None) -> None:
        """Evaluate the seeds, and fit population and iterations to the time."""
        begin = time.monotonic()
        for divisors in self.start:
            self._evaluate(divisors)
        if "population" in self.state.settings:
            return
        each = (time.monotonic() - begin) / len(self.start)
        whole = population * (1 + iterations / 2)
        room = whole if minutes is None else min(whole, 60 * minutes / each)
        a, b = population * iterations / 2, population  # evaluations of a share g of both: a g^2 + b g
        share = (math.sqrt(b * b + 4 * a * room) - b) / (2 * a)
        kept = {"population": max(8, round(population * share)), "iterations": max(1, round(iterations * share))}
        self.state.settings |= kept if share < 1 else {"population": population, "iterations": iterations}

    def run(self) -> Divisors:
        """Return the best divisors."""
        state, size = self.state, self.state.settings["population"]
        rounds = range(state.iteration, state.settings["iterations"] + 1)
        total = size + state.settings["iterations"] * 2 * (size // 4)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with bar(*columns) as progress:
            task = progress.add_task("search-rope", total=total, completed=min(total, len(state.losses)))
            for _ in rounds:
                for child in self._children(size):
                    self._evaluate(child)
                    best = min(state.losses.values())
                    progress.update(task, completed=len(state.losses), description=f"search-rope, best {best:.4f}")
                state.settle(sorted(state.losses, key=lambda each: state.losses[each])[:size])
        return state.population[0]

    def _children(self, size: int) -> Iterable[Divisors]:
        """Yield what an iteration evaluates; the same after an interruption."""
        state = self.state
        state.chance.setstate(state.began)
        seen = set(list(state.losses)[: state.settled]) | set(self.start)
        made: list[Divisors] = []

        def add(make: Callable[[], Divisors | None]) -> None:
            found = next((child for child in (make() for _ in range(TRIES)) if child is not None), None)
            if found is not None:
                made.append(found)
                seen.add(found)

        def mutate(parents: list[Divisors]) -> Divisors | None:
            return mutated(state.chance.choice(parents), seen, state.chance, self.step, self.largest)

        def cross(parents: list[Divisors]) -> Divisors | None:
            first, second = state.chance.sample(parents, 2)
            return crossed(first, second, seen, state.chance)

        if not state.population:
            for _ in range(size - len(self.start)):
                add(lambda: mutate(self.start + made))
            return made
        parents = state.population[: size // 2]
        for _ in range(size // 4):
            add(lambda: mutate(parents))
            add(lambda: cross(parents))
        return made

    def _evaluate(self, divisors: Divisors) -> None:
        if divisors not in self.state.losses:
            self.state.note(divisors, self.loss(divisors))
