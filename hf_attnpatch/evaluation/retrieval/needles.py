"""Passkey, needle, and RULER's needles in a haystack (2404.06654, appendix B); the templates are the published ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

from . import haystack, words
from .task import Draft, Setting, Task, first_number

_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
_DRAW: dict[str, Callable[[Random], str]] = {"words": words.key, "numbers": words.number, "uuids": words.uuid}


def _passkey(setting: Setting) -> Draft:
    """Landmark attention (2305.16300), appendix: garbage lines around the line with the key."""
    key = words.number(setting.rng, 5)
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    task = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there."
    )

    def build(units: int, filler: str) -> str:
        return f"{task}\n{haystack.noise(units, [line], [_depth(setting)], filler)}\nWhat is the pass key?"

    return Draft(build, " The pass key is", (key,), (line,))


def _needle(setting: Setting) -> Draft:
    """Kamradt's needle in an essay; place, meal, park and weather are drawn. All three parts must be named."""
    city, meal, park, weather = (
        setting.rng.choice(table) for table in (words.CITIES, words.MEALS, words.PARKS, words.WEATHERS)
    )
    line = f"The best thing to do in {city} is eat {meal} and sit in {park} on {weather}."

    def build(units: int, filler: str) -> str:
        text = haystack.essay(setting.essay, units, [line], [_depth(setting)], filler)
        return f"{text}\n\nWhat is the best thing to do in {city}?"

    return Draft(build, f" The best thing to do in {city} is", (meal, park, weather), (line,))


def _niah(
    setting: Setting,
    hay: str,
    keys: str = "words",
    values: str = "numbers",
    num_k: int = 1,
    num_v: int = 1,
    num_q: int = 1,
) -> Draft:
    """``num_k`` keys with ``num_v`` values each, ``num_q`` of the keys asked for, in noise, an essay or needles."""
    rng, kind = setting.rng, values
    names = _distinct(rng, keys, max(num_k, num_q))
    hidden = {name: [_DRAW[values](rng) for _ in range(num_v)] for name in names}
    asked = names[:num_q]
    lines = [_NEEDLE.format(kind=kind, key=name, value=value) for name in names for value in hidden[name]]
    depths = [_depth(setting) if setting.depth is not None and n == 0 else rng.random() for n in range(len(lines))]
    more = rng.getrandbits(64)
    one = num_q * num_v == 1
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    body, begin = (part.replace("{query}", query) for part in (_ONE if one else _MANY))
    kind = kind[:-1] if one else kind

    def build(units: int, filler: str) -> str:
        if hay == "noise":
            context = haystack.noise(units, lines, depths, filler)
        elif hay == "essay":
            context = haystack.essay(setting.essay, units, lines, depths, filler)
        else:
            others = _distractors(Random(more), units, keys, values, names)
            context = "\n".join(haystack.insert(others, lines, depths)) + filler
        return body.format(kind=kind, context=context)

    answers = tuple(value for name in asked for value in hidden[name])
    return Draft(build, begin.format(kind=kind), answers, tuple(lines))


def _depth(setting: Setting) -> float:
    return setting.rng.random() if setting.depth is None else setting.depth


def _distinct(rng: Random, kind: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_DRAW[kind](rng)] = None
    return list(found)


def _distractors(rng: Random, count: int, keys: str, values: str, taken: Sequence[str]) -> list[str]:
    """Needles for other keys; more of them begin with the same ones."""
    found: list[str] = []
    while len(found) < count:
        name, value = _DRAW[keys](rng), _DRAW[values](rng)
        if name not in taken:
            found.append(_NEEDLE.format(kind=values, key=name, value=value))
    return found


_KINDS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"hay": "noise"},
    "niah_single_2": {"hay": "essay"},
    "niah_single_3": {"hay": "essay", "values": "uuids"},
    "niah_multikey_1": {"hay": "essay", "num_k": 4},
    "niah_multikey_2": {"hay": "needles"},
    "niah_multikey_3": {"hay": "needles", "keys": "uuids", "values": "uuids"},
    "niah_multivalue": {"hay": "essay", "num_v": 4},
    "niah_multiquery": {"hay": "essay", "num_k": 4, "num_q": 4},
}

TASKS = [
    Task("passkey", _passkey, 12, score=first_number),
    Task("needle", _needle, 48, essay=True),
    *(
        Task(
            name,
            partial(_niah, **kind),
            128,
            by_depth="num_v" not in kind and "num_q" not in kind,
            essay=kind["hay"] == "essay",
        )
        for name, kind in _KINDS.items()
    ),
]
