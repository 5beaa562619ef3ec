"""Perplexity by context length: does a model benefit from tokens further back?

Published protocols cannot be compared with each other: they predict other tokens at every length. Here the same last
tokens of every document are predicted under growing context, so that a difference between lengths is the context's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .. import charts
from ..errors import EvaluationError
from .result import Result
from .score import Losses, Score, summarise
from .windows import Documents, Window, read_documents, window_losses


@dataclass(frozen=True)
class LossByLength(Result):
    """The loss of the same last tokens under growing context.

    Attributes:
        lengths: tokens in the model's input, the predicted ones included, in ascending order.
        scores: of each length.
        targets: predicted tokens of each document: its last ones.
        window: tokens that the baselines see.
        stride: tokens that the sliding baseline predicts before it moves on.
        truncated: the baseline that forgets: the last ``window`` tokens in one pass.
        sliding: the baseline that recomputes: each target in a window of its own last ``window`` tokens (fewer
            where the document begins), of which the last ``stride`` are predicted.
    """

    lengths: tuple[int, ...]
    scores: tuple[Score, ...]
    targets: int
    window: int
    stride: int
    truncated: Score
    sliding: Score

    def __getitem__(self, length: int) -> Score:
        """The score at one of the lengths."""
        return self.scores[self.lengths.index(length)]

    def __str__(self) -> str:
        rows = [(f"{length:,}", score) for length, score in zip(self.lengths, self.scores, strict=True)]
        rows += [(f"truncated {self.window:,}", self.truncated), (f"sliding {self.window:,}", self.sliding)]
        documents = len(self.truncated.losses)
        head = (
            f"last {self.targets:,} tokens of {documents} documents, nats per token (95 % over documents), perplexity"
        )
        return "\n".join(
            [head, *(f"{n:>18}  {s.nats:.4f} [{s.low:.4f}, {s.high:.4f}]  {s.perplexity:.2f}" for n, s in rows)]
        )

    def _figures(self) -> Iterable[bytes]:
        rows = [(f"{length:,} tokens", score, "ours") for length, score in zip(self.lengths, self.scores, strict=True)]
        rows += [(f"truncated {self.window:,}", self.truncated, "others")]
        rows += [(f"sliding {self.window:,}", self.sliding, "others")]
        bars = [charts.Bar(said, score.nats, f"{score.nats:.3f}", colour) for said, score, colour in rows]
        note = f"nats per token, the last {self.targets:,} of each document; less is better"
        yield charts.alone(charts.bars("Loss by context", bars, note))


def perplexity(
    model: nn.Module,
    documents: Documents,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    targets: int = 256,
    window: int | None = None,
    stride: int | None = None,
    bos_token_id: int | None = None,
    batch_tokens: int = 8192,
    resamples: int = 2000,
) -> LossByLength:
    """Measure how well the last tokens of documents are predicted with more and more context.

    Every document weighs by its targets, of which all have as many. Logits are computed for the targets only.

    Args:
        model: a causal language model, patched or not; run in eval mode, put back as it was.
        documents: token ids, each at least as long as the longest length; a mapping gives them names.
        lengths: tokens of input, the targets included.
        targets: how many of the last tokens are predicted; fewer than the shortest length.
        window: tokens that the baselines see; the shortest length unless given.
        stride: of the sliding baseline; a quarter of the targets unless given.
        bos_token_id: put before every window, and counted in its length, for models that were trained with it.
        batch_tokens: tokens in a forward pass, at most; one window at least.
        resamples: bootstrap resamples, of documents.

    Raises:
        EvaluationError: a document is too short, the lengths do not fit the targets, or a loss is not finite.
    """
    lengths = sorted(set(lengths))
    window, stride = window or min(lengths, default=0), stride or max(1, targets // 4)
    _check(lengths, targets, window, stride)
    room = 0 if bos_token_id is None else 1
    texts = read_documents(documents, max(window, *lengths) - room)
    prefix = torch.tensor([] if bos_token_id is None else [bos_token_id], dtype=torch.int64)
    windows: list[Window] = []
    for name, ids in texts.items():
        for length in {*lengths, window}:
            windows.append(Window(length, name, _last(ids, length, prefix), targets))
        edges = [*range(0, targets, stride), targets] if stride < targets else []  # else it is the truncated one
        for start, end in pairwise(edges):  # targets counted from the first one
            upto = ids[: len(ids) - targets + end]
            windows.append(Window("sliding", name, _last(upto, window, prefix), end - start))
    losses = _summed(model, windows, batch_tokens)
    scores = {group: summarise(found, resamples=resamples) for group, found in losses.items()}
    by_length = tuple(scores[length] for length in lengths)
    sliding = scores.get("sliding", scores[window])
    return LossByLength(tuple(lengths), by_length, targets, window, stride, scores[window], sliding)


def _last(ids: Tensor, length: int, prefix: Tensor) -> Tensor:
    """Return a window of ``length`` tokens that ends where ``ids`` end, the prefix included."""
    start = len(ids) - (length - len(prefix))
    return torch.cat([prefix, ids[max(0, start) :]])


def _summed(model: nn.Module, windows: Sequence[Window], batch_tokens: int) -> dict[Hashable, Losses]:
    found: dict[Hashable, Losses] = {}
    for window, row in window_losses(model, windows, batch_tokens=batch_tokens, progress="perplexity by length"):
        losses = found.setdefault(window.group, {})
        total, count = losses.get(window.document, (0.0, 0))
        losses[window.document] = (total + float(row.sum()), count + len(row))
    # in the order of the documents, whatever the order of the passes: scores of two models pair up
    order = list(dict.fromkeys(window.document for window in windows))
    return {group: {name: losses[name] for name in order} for group, losses in found.items()}


def _check(lengths: Sequence[int], targets: int, window: int, stride: int) -> None:
    if not lengths or targets < 1 or stride < 1:
        raise EvaluationError(
            f"lengths={list(lengths)}, targets={targets}, stride={stride}; wanted at least one length, one target and "
            "a stride of 1 or more."
        )
    if targets >= min(*lengths, window):
        raise EvaluationError(
            f"targets={targets}: with lengths={list(lengths)} and window={window}, the shortest input has no token "
            f"before its first target; wanted at most {min(*lengths, window) - 1} targets, or longer lengths."
        )
