"""Ratios of damages, with intervals over documents."""

from __future__ import annotations

import torch

from hf_attnpatch.evaluation import Interval, Score


def damage_ratio(original: Score, better: Score, worse: Score, *, resamples: int = 2000) -> Interval:
    """How much of one conversion's damage another has: excess losses over the original, divided.

    The interval resamples whole documents, the same ones in all three scores.

    Args:
        original: of the unconverted model.
        better: whose damage is the numerator.
        worse: whose damage is the denominator.
        resamples: bootstrap resamples.

    Raises:
        ValueError: they were measured on different documents.
    """
    if not original.losses.keys() == better.losses.keys() == worse.losses.keys():
        raise ValueError("the scores are of different documents; measure all on the same.")
    sums = torch.tensor(
        [[score.losses[key][0] for key in original.losses] for score in (original, better, worse)], dtype=torch.float64
    )
    above = sums[1:] - sums[0]  # 2, documents
    draws = torch.randint(above.shape[1], (resamples, above.shape[1]), generator=torch.Generator().manual_seed(0))
    drawn = above[:, draws].sum(dim=-1)  # 2, resamples
    bounds = (drawn[0] / drawn[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    total = above.sum(dim=-1)
    return Interval(float(total[0] / total[1]), float(bounds[0]), float(bounds[1]))
