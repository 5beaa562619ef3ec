"""Retrieval: does a model find what is far back?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..result import Result
from ..score import Interval, ratio
from .answering import Answers
from .examples import examples, find_task


@dataclass(frozen=True)
class Answer(Result):
    """One answer.

    Attributes:
        length: tokens of prompt and answer together.
        depth: of the needle, or None.
        sample: its number.
        wanted: what the answer had to contain.
        answer: what the model said.
        score: 0 to 100.
    """

    length: int
    depth: float | None
    sample: int
    wanted: tuple[str, ...]
    answer: str
    score: float


@dataclass(frozen=True)
class Retrieval(Result):
    """Retrieval scores, by length and depth.

    Attributes:
        task: its name.
        lengths: tokens of prompt and answer together.
        depths: of the needle, or None alone where the task has no such place.
        samples: prompts for each length and depth.
        seed: they were drawn from.
        answers: every answer.
        tokens: of all prompts.
        reused: how many of these were not read again, for they were a prefix read before.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float | None, ...]
    samples: int
    seed: int
    answers: tuple[Answer, ...]
    tokens: int
    reused: int

    def grid(self) -> tuple[tuple[float, ...], ...]:
        """Mean scores, a row for each length, a column for each depth: what a heat map shows."""
        return tuple(
            tuple(
                sum(a.score for a in self.answers if (a.length, a.depth) == (length, depth)) / self.samples
                for depth in self.depths
            )
            for length in self.lengths
        )

    def score(self, length: int | None = None, *, resamples: int = 2000) -> Interval:
        """The mean score, of one length or of all, with its interval over samples."""
        found: dict[tuple[int, int], list[float]] = {}
        for answer in self.answers:
            if length in (None, answer.length):
                found.setdefault((answer.length, answer.sample), []).append(answer.score)
        sums = torch.tensor([sum(scores) for scores in found.values()], dtype=torch.float64)
        return ratio(sums, torch.tensor([len(scores) for scores in found.values()]), resamples=resamples)

    def __str__(self) -> str:
        shown = ["all" if depth is None else f"{depth:.2f}" for depth in self.depths]
        lines = [
            f"{self.task}: score of 100 by length and depth of the needle, {self.samples} samples each",
            f"{'length':>8}  {'  '.join(f'{depth:>6}' for depth in shown)}    mean (95 %)",
        ]
        for length, row in zip(self.lengths, self.grid(), strict=True):
            mean = self.score(length)
            cells = "  ".join(f"{value:6.1f}" for value in row)
            lines.append(f"{length:>8,}  {cells}  {mean.value:6.1f} [{mean.low:.1f}, {mean.high:.1f}]")
        lines.append(f"{self.reused:,} of {self.tokens:,} prompt tokens were a prefix that had been read before")
        return "\n".join(lines)


def retrieval(
    model: nn.Module,
    tokenizer: Any,
    *,
    task: str = "passkey",
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    depths: Sequence[float] | None = None,
    samples: int = 5,
    seed: int = 0,
    text: str | None = None,
    new_tokens: int | None = None,
    chat: bool = False,
    batch_tokens: int = 8192,
) -> Retrieval:
    """Ask a model for what is hidden in prompts of exact lengths, and score its greedy answers by the published rule.

    Args:
        model: a causal language model with a cache, patched or not; run in eval mode, put back as it was.
        tokenizer: its tokenizer.
        task: passkey, needle, key_value, or of RULER: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue,
            niah_multiquery, vt, cwe, fwe.
        lengths: tokens of prompt and answer together, as in RULER; reached within one token.
        depths: of the needle, 0 to 1; quarters unless given. Tasks without one needle take none.
        samples: prompts for each length and depth.
        seed: of everything that is drawn.
        text: what essay tasks hide their needles in; the embedded held-out prose unless given.
        new_tokens: tokens of an answer, at most; the published number unless given.
        chat: wrap questions in the tokenizer's chat template.
        batch_tokens: tokens in a batch, at most; one prompt at least.

    Raises:
        EvaluationError: no such task, a depth where there is none, a length that the task does not fit in, a model
            without a cache, or logits that are not finite.
    """
    kind = find_task(task)
    lengths = tuple(sorted(set(lengths)))
    what = {"depths": depths, "samples": samples, "seed": seed, "text": text, "chat": chat}
    room = kind.new_tokens if new_tokens is None else new_tokens
    drawn = examples(tokenizer, task=task, lengths=lengths, new_tokens=room, **what)  # type: ignore[arg-type]
    ask = Answers(model, tokenizer, kind, room, batch_tokens)
    answers = tuple(
        Answer(e.length, e.depth, e.sample, e.answers, answer, kind.points(answer, e.answers))
        for e, answer in ask(drawn)
    )
    places = tuple(dict.fromkeys(e.depth for e in drawn))
    return Retrieval(task, lengths, places, samples, seed, answers, ask.tokens, ask.reused)
