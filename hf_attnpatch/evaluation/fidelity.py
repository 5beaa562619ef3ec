"""Compares a patched model with its original: distributions, most likely tokens, continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..progress import track
from .generation import greedy
from .logits import positions_at_once, span_logits
from .mode import device_of, measuring
from .result import Result
from .score import Interval, Losses, Score, ratio, summarise


@dataclass(frozen=True)
class Fidelity(Result):
    """How close a model is to its original. Equal models give exactly 0, 1 and 1.

    Attributes:
        kl: divergence of the next-token distributions from the original's, KL(original || patched), nats per token.
        top1: share of positions at which both have the same most probable token.
        continuation: share of greedily decoded tokens before the first one that differs; None if none were decoded.
        continued: tokens decoded after each row.
    """

    kl: Score
    top1: Interval
    continuation: Interval | None
    continued: int

    def __str__(self) -> str:
        lines = [
            f"against the original, {self.kl.tokens:,} tokens in {len(self.kl.losses)} rows (95 % over rows)",
            f"  KL divergence, nats   {self.kl.nats:.6f} [{self.kl.low:.6f}, {self.kl.high:.6f}]",
            f"  same first choice     {_shown(self.top1)}",
        ]
        if self.continuation is not None:
            lines.append(f"  same greedy tokens    {_shown(self.continuation)} of {self.continued}")
        return "\n".join(lines)


def fidelity(
    original: nn.Module,
    patched: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    continuation: int = 32,
    batch_tokens: int = 4096,
    resamples: int = 2000,
) -> Fidelity:
    """Compare two models on the same rows.

    What the attention mask leaves out is cut off, and rows of one length share a pass: padding is never seen by either.

    Args:
        original: the model to compare with.
        patched: the model to judge; same vocabulary. Both are run in eval mode and put back as they were.
        batches: each with ``input_ids`` of shape (batch, length), int64, and, where rows are padded on either side,
            ``attention_mask`` of the same shape.
        continuation: tokens to decode greedily after each row; 0 for a model without a cache.
        batch_tokens: tokens in a forward pass, at most; one row at least.
        resamples: bootstrap resamples, of rows.

    Raises:
        EvaluationError: no rows, an empty row, other vocabularies, no cache, or logits that are not finite.
    """
    if not isinstance(continuation, int) or isinstance(continuation, bool) or continuation < 0:
        raise EvaluationError(f"continuation={continuation!r}; wanted a number of tokens, or 0 for none.")
    rows = _rows(batches)
    parts = _parts(rows, batch_tokens)
    kl: Losses = {}
    agreed: dict[str, int] = {}
    kept: dict[str, int] = {}
    with measuring(original, patched):
        for names in track(parts, "fidelity"):
            ids = torch.stack([rows[name] for name in names])  # batch, length
            found = [value.tolist() for value in _compared(original, patched, ids, names)]
            for name, total, same in zip(names, *found, strict=True):
                kl[name], agreed[name] = (total, ids.shape[1]), same
            if continuation:
                kept.update(zip(names, _continued(original, patched, ids, continuation), strict=True))
    kl, lengths = {name: kl[name] for name in rows}, torch.tensor([len(ids) for ids in rows.values()])
    top1 = ratio(torch.tensor([agreed[name] for name in rows]).double(), lengths, resamples=resamples)
    shares = torch.tensor([kept[name] for name in kept]).double()
    same = ratio(shares, torch.full((len(kept),), continuation), resamples=resamples) if kept else None
    return Fidelity(summarise(kl, resamples=resamples), top1, same, continuation)


def _rows(batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the rows without padding, shape (tokens,), by name."""
    rows: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = f"the fields {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise EvaluationError(f"batch {number}: found {found}; wanted a mapping with input_ids, (batch, length).")
        ids = torch.as_tensor(batch["input_ids"])
        mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))
        if ids.dim() != 2 or mask.shape != ids.shape:
            raise EvaluationError(
                f"batch {number}: input_ids of shape {tuple(ids.shape)} with a mask of shape {tuple(mask.shape)}; "
                "wanted (batch, length) for both."
            )
        for index, (row, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
            name, places = f"batch {number} row {index}", keep.nonzero()[:, 0]
            if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
                raise EvaluationError(f"{name}: its attention mask keeps {len(places)} tokens; wanted one run of them.")
            rows[name] = row[keep]
    if not rows:
        raise EvaluationError("there are no batches to compare the models on; give at least one.")
    return rows


def _parts(rows: Mapping[str, Tensor], batch_tokens: int) -> list[list[str]]:
    by_length: dict[int, list[str]] = {}
    for name, ids in rows.items():
        by_length.setdefault(len(ids), []).append(name)
    parts = []
    for length, names in sorted(by_length.items()):
        count = max(1, batch_tokens // length)
        parts += [names[start : start + count] for start in range(0, len(names), count)]
    return parts


def _compared(original: nn.Module, patched: nn.Module, ids: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return the summed divergence and the number of equal most likely tokens of each row, shape (batch,)."""
    step = max(1, min(positions_at_once(model, len(ids)) for model in (original, patched)) // 2)
    total, same = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.int64)
    spans = [span_logits(model, ids.to(device_of(model)), 0, ids.shape[1], step) for model in (original, patched)]
    for wanted, found in zip(*spans, strict=True):  # batch, positions, vocabulary
        if wanted.shape != found.shape:
            raise EvaluationError(
                f"the original has a vocabulary of {wanted.shape[-1]}, the patched model one of {found.shape[-1]}; "
                "compare models of one vocabulary."
            )
        for row, name in enumerate(names):
            p, q = (torch.log_softmax(x[row].float(), dim=-1) for x in (wanted, found.to(wanted.device)))
            for model, values in (("original", p), ("patched", q)):
                if torch.isnan(values).any():
                    raise EvaluationError(f"{name}: logits of the {model} model are not finite; look at its weights.")
            apart = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0)  # what never happens counts nothing
            total[row] += apart.double().sum().cpu()
            same[row] += (p.argmax(dim=-1) == q.argmax(dim=-1)).sum().cpu()
    return total, same


def _continued(original: nn.Module, patched: nn.Module, ids: Tensor, count: int) -> list[int]:
    """Return how many greedy tokens of each row precede the first that differs."""
    found = [greedy(model, ids.to(device_of(model)), count).cpu() for model in (original, patched)]
    return (found[0] == found[1]).int().cumprod(dim=1).sum(dim=1).tolist()


def _shown(share: Interval) -> str:
    return f"{share.value:.4f} [{share.low:.4f}, {share.high:.4f}]"
