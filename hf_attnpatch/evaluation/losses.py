"""Losses of a text's blocks by document, and their mean, for training and calibration."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..progress import track
from .logits import IGNORED, token_losses
from .mode import device_of, measuring
from .score import Losses, Score, summarise

Block = Mapping[str, Any]


def mean_loss(
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
        EvaluationError: no token to predict, or a loss that is not finite; it names the document.
    """
    return summarise(document_losses(model, blocks, batch=batch, progress=progress), resamples=resamples)


def document_losses(
    model: nn.Module, blocks: Iterable[Block], *, batch: int = 8, progress: str | None = None
) -> Losses:
    """Sum the next-token losses of every document; see :func:`mean_loss`. Several processes may share the blocks."""
    passes = _passes(blocks, batch)
    found: dict[Hashable, tuple[float, int]] = {}
    with measuring(model):
        for part in track(passes, progress) if progress else passes:
            ids, labels = _stacked(part, "input_ids", model), _stacked(part, "labels", model)  # batch, length
            losses = token_losses(model, ids, labels[:, 1:]) if ids.shape[1] > 1 else labels[:, 1:].float()
            sums, counts = losses.double().sum(dim=1).tolist(), (labels[:, 1:] != IGNORED).sum(dim=1).tolist()
            for (number, block), row, total, count in zip(part, losses, sums, counts, strict=True):
                key = block.get("document", number)
                check_finite(row, f"document {key}", ids.shape[1])
                before = found.get(key, (0.0, 0))
                found[key] = (before[0] + total, before[1] + count)
    return found


def check_finite(losses: Tensor, name: str, length: int) -> None:
    """Refuse losses of one row that are not finite: an average must not hide them.

    Raises:
        EvaluationError: one is not finite; the message names the item, the token and the length.
    """
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        position = length - len(losses) + int(bad[0])
        raise EvaluationError(
            f"{name}: the loss of token {position} of {length} is {float(losses[bad[0]])}, as {len(bad)} of its "
            f"{len(losses)} are not finite; look at the model's logits there: weights, dtype, attention mask."
        )


def _passes(blocks: Iterable[Block], batch: int) -> list[list[tuple[int, Block]]]:
    """Return numbered blocks in groups of at most ``batch``, each of one length."""
    by_length: dict[int, list[tuple[int, Block]]] = {}
    for number, block in enumerate(blocks):
        by_length.setdefault(len(block["input_ids"]), []).append((number, block))
    return [same[start : start + batch] for same in by_length.values() for start in range(0, len(same), batch)]


def _stacked(part: list[tuple[int, Block]], name: str, model: nn.Module) -> Tensor:
    rows = [torch.as_tensor(block.get(name, block["input_ids"])) for _, block in part]
    return torch.stack(rows).to(device_of(model))
