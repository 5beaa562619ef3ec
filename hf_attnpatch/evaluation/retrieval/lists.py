"""Key-value retrieval, and RULER's variable tracking, common words and frequent words (2404.06654, appendix B)."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from itertools import islice
from random import Random

from . import haystack, words
from .task import Draft, Setting, Task

_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are:",  # the published spelling
)
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_HOPS, _EXAMPLE_NOISE = 4, 5


def _key_value(setting: Setting) -> Draft:
    """Lost in the middle (2307.03172), section 3: a JSON object of UUIDs."""
    rng = setting.rng
    key, value, more = words.uuid(rng), words.uuid(rng), rng.getrandbits(64)
    depth = rng.random() if setting.depth is None else setting.depth
    pair = f'"{key}": "{value}"'

    def build(units: int, filler: str) -> str:
        others = Random(more)
        pairs = [f'"{words.uuid(others)}": "{words.uuid(others)}"' for _ in range(units)]
        records = "{" + ",\n ".join(haystack.insert(pairs, [pair], [depth])) + "}" + filler
        return (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'JSON data:\n{records}\n\nKey: "{key}"'
        )

    return Draft(build, "\nCorresponding value:", (value,), (pair,))


def _tracking(setting: Setting) -> Draft:
    """One chain of assignments over four hops in noise, after one short solved example."""
    rng = setting.rng
    shown, names = _variables(rng, 3), _variables(rng, 5)
    example_value, value = words.number(rng, 5), words.number(rng, 5)
    places = sorted(rng.random() for _ in names)
    lines = _chain(names, value)
    before = haystack.noise(_EXAMPLE_NOISE, _chain(shown, example_value), [n / _HOPS for n in range(len(shown))], "")
    example = "".join(_VT).format(context=before, query=example_value, count=len(shown))

    def build(units: int, filler: str) -> str:
        context = haystack.noise(units, lines, places, filler)
        return f"{example} {' '.join(shown)}\n\n\n{_VT[0].format(context=context, query=value)}"

    return Draft(build, _VT[1].format(query=value, count=len(names)), tuple(names), tuple(lines))


def _variables(rng: Random, letters: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < _HOPS + 1:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)


def _chain(names: Sequence[str], value: str) -> list[str]:
    hops = [f"VAR {new} = VAR {old}" for old, new in zip(names[:-1], names[1:], strict=True)]
    return [f"VAR {names[0]} = {value}", *hops]


def _common_words(setting: Setting) -> Draft:
    """Ten words thirty times among others three times; six times and once below 4,096 tokens, as in RULER's scripts."""
    short = setting.length < 4096
    often, seldom = (6, 1) if short else (30, 3)
    shown = (20, 3, 1) if short else (40, 10, 3)
    seeds = [setting.rng.getrandbits(64) for _ in range(2)]
    example, example_answer = _numbered(seeds[0], *shown)
    answers = _numbered(seeds[1], 11, often, seldom)[1]

    def build(units: int, filler: str) -> str:
        context, _ = _numbered(seeds[1], 10 + units, often, seldom)
        solved = " ".join(f"{n}. {word}" for n, word in enumerate(example_answer, 1))
        return f"{''.join(_CWE).format(context=example)} {solved}\n{_CWE[0].format(context=context + filler)}"

    return Draft(build, _CWE[1], tuple(answers), tuple(f" {word}" for word in answers))


def _numbered(seed: int, num_words: int, often: int, seldom: int) -> tuple[str, list[str]]:
    rng = Random(seed)
    drawn = list(islice(words.distinct(rng), num_words))
    common = drawn[:10]
    listed = common * often + drawn[10:] * seldom
    Random(seed + 1).shuffle(listed)
    return " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1)), common


def _frequent_words(setting: Setting) -> Draft:
    """Coded words whose counts fall with the square of their rank (a zeta distribution, alpha 2); the first is dots."""
    rng, size = setting.rng, max(8, setting.length // 50)
    coded: dict[str, None] = {}
    while len(coded) < size:
        coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(coded)[1:]]
    seed = rng.getrandbits(64)

    def build(units: int, filler: str) -> str:
        counts = (int(units * rank**-2.0 / (math.pi**2 / 6)) for rank in range(1, len(ranked) + 1))
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        Random(seed).shuffle(text)
        return _FWE[0].format(context=" ".join(text) + filler)

    # with fewer, the fourth word would be no more frequent than the fifth
    return Draft(build, _FWE[1], tuple(ranked[1:4]), tuple(ranked[1:4]), least=60)


TASKS = [
    Task("key_value", _key_value, 100),
    Task("vt", _tracking, 30, by_depth=False),
    Task("cwe", _common_words, 120, by_depth=False),
    Task("fwe", _frequent_words, 50, by_depth=False),
]
