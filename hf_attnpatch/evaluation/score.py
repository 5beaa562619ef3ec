"""Losses by document, their mean, and its interval.

Tokens of one document are far from independent, so what is resampled is documents, whole. Two models measured on the
same documents are compared pairwise: most of the spread is between texts and cancels in the difference.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import EvaluationError
from .result import Result

Losses = dict[Hashable, tuple[float, int]]
_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Interval(Result):
    """A value and the bounds of its 95 % bootstrap interval, in the unit of the value."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score(Result):
    """What a model loses on a text.

    Attributes:
        nats: mean loss in nats, every token weighing the same.
        low: lower bound of its interval.
        high: upper bound of its interval.
        tokens: predicted tokens.
        losses: document -> (sum of losses in nats, predicted tokens).
    """

    nats: float
    low: float
    high: float
    tokens: int
    losses: Losses

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss; infinite beyond what a float holds."""
        return math.exp(self.nats) if self.nats < _LARGEST else math.inf


def summarise(losses: Losses, *, resamples: int = 2000) -> Score:
    """Turn losses by document into a mean with its interval.

    Raises:
        EvaluationError: no token to predict, or a loss that is not finite.
    """
    sums, counts = _columns(losses)
    mean = ratio(sums, counts, resamples=resamples)
    return Score(mean.value, mean.low, mean.high, int(counts.sum()), losses)


def difference(before: Score, after: Score, *, resamples: int = 2000) -> Interval:
    """How much more ``after`` loses than ``before`` on the same documents, with a paired 95 % interval.

    Raises:
        EvaluationError: they were measured on different documents.
    """
    if set(after.losses) != set(before.losses):
        raise EvaluationError("the two scores are of different documents; measure both on the same blocks.")
    (old, counts), (new, others) = _columns(before.losses), _columns({key: after.losses[key] for key in before.losses})
    if not torch.equal(counts, others):
        raise EvaluationError("the two scores are of different documents; measure both on the same blocks.")
    return ratio(new - old, counts, resamples=resamples)


def ratio(sums: Tensor, counts: Tensor, *, resamples: int = 2000) -> Interval:
    """Return sum(sums) / sum(counts) with the percentile interval of resampled documents.

    Args:
        sums: of each document, shape (documents,), float64.
        counts: of each document, shape (documents,).
        resamples: bootstrap resamples.

    Raises:
        EvaluationError: the counts add up to nothing.
    """
    if not int(counts.sum()):
        raise EvaluationError("there is no token to predict: no blocks, blocks of one token, or every label is -100.")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(sums), (resamples, len(sums)), generator=generator)  # resamples, documents
    drawn = counts[draws].sum(dim=1)  # a resample may hold nothing but documents without a token: it says nothing
    means = (sums[draws].sum(dim=1) / drawn)[drawn > 0]
    bounds = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(sums.sum() / counts.sum()), float(bounds[0]), float(bounds[1]))


def _columns(losses: Losses) -> tuple[Tensor, Tensor]:
    for document, (total, _) in losses.items():
        if not math.isfinite(total):
            raise EvaluationError(
                f"document {document}: its loss is {total}, wanted a finite one; look at this document's logits."
            )
    pairs = list(losses.values())
    return torch.tensor([p[0] for p in pairs], dtype=torch.float64), torch.tensor([p[1] for p in pairs])
