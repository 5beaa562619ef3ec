"""The definition of a retrieval task: prompts of any length, and the rule that scores an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Setting:
    """The parameters of a prompt.

    Attributes:
        rng: drawn from in a fixed order; the same for all depths of a sample.
        depth: 0 puts the needle at the beginning of the haystack, 1 at its end; None where the task has no such place.
        length: tokens of prompt and answer together.
        essay: words to hide needles in.
    """

    rng: Random
    depth: float | None
    length: int
    essay: Sequence[str]


@dataclass(frozen=True)
class Draft:
    """A prompt whose haystack is not sized yet.

    Attributes:
        build: (units of haystack, filler) -> what is asked; the filler is a text to end the haystack with.
        begin: how the answer begins: the end of the prompt.
        answers: what the answer must contain.
        hidden: pieces of text that must be in the prompt whole.
        least: fewest units with which the task makes sense.
    """

    build: Callable[[int, str], str]
    begin: str
    answers: tuple[str, ...]
    hidden: tuple[str, ...]
    least: int = 1


@dataclass(frozen=True)
class Task:
    """A task by name.

    Attributes:
        name: as in its paper.
        draft: draws a prompt.
        new_tokens: room for the answer, as published; it is part of a length.
        by_depth: whether there is one needle whose depth can be chosen.
        essay: whether it needs a text to hide needles in.
        score: (answer, wanted) -> 0 to 1.
        monotone: whether more text can never lower the score, so that decoding may stop at 1.
    """

    name: str
    draft: Callable[[Setting], Draft]
    new_tokens: int
    by_depth: bool = True
    essay: bool = False
    score: Callable[[str, Sequence[str]], float] | None = None

    @property
    def monotone(self) -> bool:
        """Whether more text can never lower the score."""
        return self.score is None

    def points(self, answer: str, wanted: Sequence[str]) -> float:
        """Score an answer from 0 to 100 by the published rule."""
        return 100.0 * (self.score or string_match_all)(answer, wanted)


def string_match_all(answer: str, wanted: Sequence[str]) -> float:
    """RULER's rule (2404.06654, section 4): the share of wanted strings that the answer contains, case aside."""
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    return sum(one.lower() in text for one in wanted) / len(wanted)


def first_number(answer: str, wanted: Sequence[str]) -> float:
    """The rule of passkey retrieval (2305.16300, section 4.2): the first number of the answer is the one wanted."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found.group() == wanted[0])
