"""Compares a runtime's answer with the reference: tokens, log-probabilities, and the meaning of a departure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# transformers differs from itself, with its cache and without, by 6e-5 nats in float32 on SmolLM2 and by 7e-4 where a
# mean of its heads has made it worse; a wrong angle or a swapped head is off by tenths and more
NEAR_TIE = 1e-2  # nats: two tokens this close may swap by rounding
AT_MOST = 1e-2  # nats: a log-probability further off is no rounding any more

SAME, TIES, DEPARTS, OTHER = "same", "same up to near ties", "DEPARTS", "OTHER LOGITS"
Answer = Mapping[str, Any]
Step = Mapping[int, float]


@dataclass(frozen=True)
class Departure:
    """The first token at which a continuation goes another way.

    `wanted` is the reference's token and `found` the other's; `gap` is by how many nats the reference prefers its own,
    which is the difference of the two logits. `at_least` says that `found` is not among the reference's best tokens,
    so that the gap is a lower bound.
    """

    prompt: int
    step: int
    wanted: int
    found: int
    gap: float
    at_least: bool = False


@dataclass(frozen=True)
class Finding:
    """A runtime compared with the reference; `tokens` counts those before a departure."""

    prompts: int
    equal_prompts: int
    tokens: int
    equal_tokens: int
    departures: tuple[Departure, ...]
    largest_difference: float
    kl: float
    verdict: str

    def record(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {**asdict(self), "departures": [asdict(departure) for departure in self.departures]}


def steps_of(answer: Answer) -> list[list[dict[int, float]]]:
    """The log-probabilities by prompt and step, with token ids as numbers again, which JSON makes text."""
    return [[{int(k): float(v) for k, v in step.items()} for step in steps] for steps in answer["logprobs"]]


def departure(prompt: int, wanted: list[int], found: list[int], steps: list[dict[int, float]]) -> Departure | None:
    """Where a continuation departs from the reference's, whose log-probabilities are `steps`; None if nowhere."""
    if len(wanted) != len(found):
        raise ValueError(f"prompt {prompt}: {len(found)} tokens, wanted {len(wanted)} as in the reference.")
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a != b:
            listed = steps[i]
            return Departure(prompt, i, a, b, listed[a] - listed.get(b, min(listed.values())), b not in listed)
    return None


def largest_difference(wanted: Step, found: Step) -> float:
    """The largest difference of the log-probabilities of the reference's best tokens, in nats.

    A token that the other does not list has at most its smallest listed value, which bounds the difference from below.
    Infinite where a value is not a number.
    """
    floor = min(found.values())
    all_of = [abs(v - found[token]) if token in found else max(v - floor, 0.0) for token, v in wanted.items()]
    return max(all_of) if all(map(math.isfinite, [*all_of, *found.values()])) else math.inf


def kl_divergence(wanted: Step, found: Step) -> float:
    """KL(reference || other) in nats over the tokens that both list, the rest of the vocabulary taken as one token."""
    shared = wanted.keys() & found.keys()
    total = sum(math.exp(wanted[t]) * (wanted[t] - found[t]) for t in shared)
    p, q = (max(1.0 - sum(math.exp(side[t]) for t in shared), 1e-9) for side in (wanted, found))
    return max(total + p * math.log(p / q), 0.0)


def compare(reference: Answer, answer: Answer, near_tie: float = NEAR_TIE, at_most: float = AT_MOST) -> Finding:
    """Compares a runtime's answer with the reference's.

    Args:
        reference: transformers' own continuations with the log-probabilities they were chosen by.
        answer: the other's continuations, and its log-probabilities along the reference's continuations.
        near_tie: nats; a departure between tokens this close is explained by rounding.
        at_most: nats; the largest difference of log-probabilities that is rounding.

    Returns:
        The finding. Its verdict is `same`, `same up to near ties`, `DEPARTS` or `OTHER LOGITS` (the same tokens, by
        other numbers).

    Raises:
        ValueError: if the answer has another number of prompts or of tokens.
    """
    wanted, found = steps_of(reference), steps_of(answer)
    counts = {len(part) for part in (reference["continuations"], answer["continuations"], wanted, found)}
    if len(counts) > 1:
        raise ValueError(f"answers for {sorted(counts)} prompts; wanted one number.")
    both = zip(reference["continuations"], answer["continuations"], wanted, strict=True)
    departures = [d for i, (a, b, steps) in enumerate(both) if (d := departure(i, a, b, steps))]
    pairs = [pair for a, b in zip(wanted, found, strict=True) for pair in zip(a, b, strict=True)]
    largest = max(largest_difference(a, b) for a, b in pairs)
    lengths = [len(tokens) for tokens in reference["continuations"]]
    return Finding(
        prompts=len(lengths),
        equal_prompts=len(lengths) - len(departures),
        tokens=sum(lengths),
        equal_tokens=sum(lengths) - sum(lengths[d.prompt] - d.step for d in departures),
        departures=tuple(departures),
        largest_difference=largest,
        kl=sum(kl_divergence(a, b) for a, b in pairs) / len(pairs),
        verdict=_verdict(departures, largest, near_tie, at_most),
    )


def _verdict(departures: list[Departure], largest: float, near_tie: float, at_most: float) -> str:
    if any(d.at_least or not d.gap <= near_tie for d in departures):
        return DEPARTS
    if largest > at_most:
        return OTHER
    return TIES if departures else SAME
