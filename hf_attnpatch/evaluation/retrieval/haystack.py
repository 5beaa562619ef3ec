"""Haystacks, and the places of needles in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle, islice

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def insert(units: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Put needles among units: depth 0 before the first, 1 after the last; several in the order of their depths."""
    found = list(units)
    places = sorted(zip((round(depth * len(units)) for depth in depths), range(len(needles)), needles, strict=True))
    for shift, (place, _, needle) in enumerate(places):
        found.insert(place + shift, needle)
    return found


def noise(count: int, needles: Sequence[str], depths: Sequence[float], filler: str) -> str:
    """Lines of the noise of passkey retrieval and RULER."""
    return "\n".join(insert([NOISE] * count, needles, depths)) + filler


def essay(words: Sequence[str], count: int, needles: Sequence[str], depths: Sequence[float], filler: str) -> str:
    """The first ``count`` words of a text, over again where it is too short, with needles between its sentences."""
    text = " ".join(islice(cycle(words), count))
    return " ".join(insert(re.split(r"(?<=[.!?])\s+", text), needles, depths)) + filler
