"""How well a causal language model predicts a text, with an interval over documents.

Tokens of one document are far from independent, so what is resampled is documents, whole. Two models measured on the
same documents are compared pairwise: most of the spread is between texts and cancels in the difference.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor, nn

Block = Mapping[str, Any]
Losses = dict[Hashable, tuple[float, int]]


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its bootstrap interval, in nats per token."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """What a model loses on a text.

    Attributes:
        nats: mean next-token loss in nats, every token weighing the same.
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
        """The exponential of the mean loss."""
        return math.exp(self.nats)


def perplexity(
    model: nn.Module, blocks: Iterable[Block], *, batch: int = 8, resamples: int = 2000, progress: str | None = None
) -> Score:
    """Measure the mean next-token loss of ``model`` over ``blocks``, with a 95 % interval over documents.

    Args:
        model: returns ``.logits`` of shape (batch, length, vocabulary); run in eval mode, put back as it was.
        blocks: each with ``input_ids`` of shape (length,), int64; optionally ``labels`` of the same shape, where -100
            does not count; optionally ``document``, which text it is from (otherwise every block is a text).
        batch: blocks in a forward pass; only blocks of one length share a pass, so nothing is padded.
        resamples: bootstrap resamples.
        progress: caption of a progress bar, shown where there is a terminal.

    Raises:
        ValueError: no token to predict.
    """
    return summarise(document_losses(model, blocks, batch=batch, progress=progress), resamples=resamples)


@torch.no_grad()
def document_losses(
    model: nn.Module, blocks: Iterable[Block], *, batch: int = 8, progress: str | None = None
) -> Losses:
    """Sum the next-token losses of every document; see :func:`perplexity`. Several processes may share the blocks."""
    passes = _passes(blocks, batch)
    found: dict[Hashable, tuple[float, int]] = {}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn())
    bar.disable = progress is None or not bar.console.is_terminal
    with bar:
        for part in bar.track(passes, description=progress or ""):
            sums, counts = _losses(model, [block for _, block in part], device)
            for (number, block), total, count in zip(part, sums, counts, strict=True):
                key = block.get("document", number)
                before = found.get(key, (0.0, 0))
                found[key] = (before[0] + total, before[1] + count)
    model.train(training)
    return found


def summarise(losses: Losses, *, resamples: int = 2000) -> Score:
    """Turn losses by document into a mean with its interval.

    Raises:
        ValueError: no token to predict.
    """
    sums, counts = _columns(losses)
    mean = _interval(sums, counts, resamples)
    return Score(mean.value, mean.low, mean.high, int(counts.sum()), losses)


def difference(before: Score, after: Score, *, resamples: int = 2000) -> Interval:
    """How much more ``after`` loses than ``before`` on the same documents, with a paired 95 % interval.

    Raises:
        ValueError: they were measured on different documents.
    """
    (old, counts), (new, others) = _columns(before.losses), _columns({key: after.losses[key] for key in before.losses})
    if len(after.losses) != len(before.losses) or not torch.equal(counts, others):
        raise ValueError("the two scores are of different documents; measure both on the same blocks.")
    return _interval(new - old, counts, resamples)


def _passes(blocks: Iterable[Block], batch: int) -> list[list[tuple[int, Block]]]:
    """Return numbered blocks in groups of at most ``batch``, each of one length."""
    by_length: dict[int, list[tuple[int, Block]]] = {}
    for number, block in enumerate(blocks):
        by_length.setdefault(len(block["input_ids"]), []).append((number, block))
    return [same[start : start + batch] for same in by_length.values() for start in range(0, len(same), batch)]


def _losses(model: nn.Module, blocks: Sequence[Block], device: torch.device) -> tuple[list[float], list[int]]:
    """Return sum of losses and number of predicted tokens of each block, all of one length."""
    ids = torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks]).to(device)  # batch, length
    labels = torch.stack([torch.as_tensor(block.get("labels", block["input_ids"])) for block in blocks]).to(device)
    logits = model(input_ids=ids, use_cache=False).logits  # batch, length, vocabulary
    sums = [
        float(nn.functional.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum", ignore_index=-100))
        for row, wanted in zip(logits, labels, strict=True)  # row by row: a float32 copy of one row at a time
    ]
    return sums, (labels[:, 1:] != -100).sum(dim=1).tolist()


def _columns(losses: Losses) -> tuple[Tensor, Tensor]:
    pairs = list(losses.values())
    return torch.tensor([p[0] for p in pairs], dtype=torch.float64), torch.tensor([p[1] for p in pairs])


def _interval(sums: Tensor, counts: Tensor, resamples: int) -> Interval:
    """Return sum(sums) / sum(counts) with the percentile interval of resampled documents."""
    if not int(counts.sum()):
        raise ValueError("there is no token to predict: no blocks, blocks of one token, or every label is -100.")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(sums), (resamples, len(sums)), generator=generator)  # resamples, documents
    means = sums[draws].sum(dim=1) / counts[draws].sum(dim=1)
    bounds = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(sums.sum() / counts.sum()), float(bounds[0]), float(bounds[1]))
