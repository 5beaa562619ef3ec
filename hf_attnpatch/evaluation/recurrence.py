"""Evaluation by recurrence (Transformer-XL, 1901.02860, section 3.2): states of earlier segments are reused.

Every token is read once and predicted with what a memory holds of all before it, where a sliding window would read the
whole window again for each few tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..interruption import entered
from ..upstream import words
from ..upstream.roles import predicted
from .logits import _cross_entropy, forward, positions_at_once
from .losses import check_finite
from .mode import device_of, measuring
from .score import Score, summarise
from .windows import Documents, read_documents


class Stream(Protocol):
    """Carries states across calls of a model while its ``with`` block lasts, row by row."""

    def __enter__(self) -> object: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def reset(self, rows: Iterable[int] | Tensor | None = None) -> None: ...  # noqa: D102


def recurrence(
    model: nn.Module, stream: Stream, documents: Documents, *, rows: int = 8, columns: int = 1024, resamples: int = 2000
) -> Score:
    """Measure the mean next-token loss of whole documents, each read once from its first token to its last.

    Args:
        model: a causal language model whose calls a stream connects; run in eval mode, put back as it was.
        stream: ``hf_attnpatch.stream(model)``, not open.
        documents: token ids, a list for each, or by name; of two tokens or more.
        rows: documents that are read side by side.
        columns: tokens of each in a call, fewer where the vocabulary is large; whole segments are fastest.
        resamples: of documents, for the interval.

    Raises:
        EvaluationError: no documents, one that is too short, or a loss that is not finite; it names the document.
    """
    found: dict[Hashable, tuple[float, int]] = {}
    for name, _, losses in document_tokens(model, stream, documents, rows=rows, columns=columns):
        before = found.get(name, (0.0, 0))
        found[name] = (before[0] + float(losses.sum()), before[1] + len(losses))
    return summarise(found, resamples=resamples)


def document_tokens(
    model: nn.Module, stream: Stream, documents: Documents, *, rows: int = 8, columns: int = 1024
) -> Iterator[tuple[Hashable, int, Tensor]]:
    """Yield name, first predicted token, and losses in nats, (tokens,), float64, of each part of each document.

    The arguments are those of :func:`recurrence`.
    """
    named = read_documents(documents, 2)
    waiting = sorted(named, key=lambda name: len(named[name]))  # the longest first, so that rows end together
    rows = min(rows, len(waiting))
    columns = min(columns, positions_at_once(model, rows))
    lanes: list[tuple[Hashable, int] | None] = [(waiting.pop(), 0) for _ in range(rows)]
    with measuring(model), entered(stream):
        stream.reset()
        while any(lane is not None for lane in lanes):
            ids, labels = _cut(named, lanes, columns)
            losses = _losses(model, ids, labels)
            for row, lane in enumerate(lanes):
                if lane is None:
                    continue
                name, start = lane
                part = losses[row, : min(columns, len(named[name]) - 1 - start)].double().cpu()
                check_finite(part, f"document {name}", start + 1 + len(part))
                yield name, start + 1, part
                start += columns
                lanes[row] = (name, start) if start < len(named[name]) - 1 else (waiting.pop(), 0) if waiting else None
                if lanes[row] is None or lanes[row] != (name, start):
                    stream.reset([row])


def _cut(
    named: dict[Hashable, Tensor], lanes: list[tuple[Hashable, int] | None], columns: int
) -> tuple[Tensor, Tensor]:
    """The next tokens of every row and those after them, each (rows, columns), int64; -100 where there are none."""
    ids = torch.zeros(len(lanes), columns, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, lane in enumerate(lanes):
        if lane is not None:
            tokens = named[lane[0]][lane[1] : lane[1] + columns + 1]
            ids[row, : len(tokens) - 1], labels[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return ids, labels


def _losses(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    keep, device = labels != -100, device_of(model)
    inputs = {} if bool(keep.all()) else {words.MASK: keep.long().to(device)}
    given = {words.TOKENS: ids.to(device), words.USE_CACHE: False, **inputs}
    logits = predicted(forward(model, given))
    if logits.shape[1] != ids.shape[1]:
        raise EvaluationError(f"{type(model).__name__}: {logits.shape[1]} logits for {ids.shape[1]} tokens.")
    return _cross_entropy(logits, labels.to(device))
