"""The texts of a comparison, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError

PROBE = "The quick brown fox\n\tjumps over 12,345 lazy dogs: `def f(x): return x**2` é 漢字"


@dataclass(frozen=True)
class Text:
    """Documents of equal length.

    Attributes:
        name: of the text, for a reader.
        documents: each of shape (length,), int64.
    """

    name: str
    documents: tuple[Tensor, ...]

    def first(self, count: int, length: int) -> list[Tensor]:
        """Return the beginnings of this many documents."""
        return [ids[:length] for ids in self.documents[:count]]


def read(texts: Sequence[str], tokenizer: Any, *, name: str, count: int, length: int) -> Text:
    """Cut texts into windows: from each text in turn, spread evenly over it.

    Args:
        texts: whole documents.
        tokenizer: of both models.
        name: of the text.
        count: windows wanted.
        length: tokens of each.

    Raises:
        EvaluationError: there is not one window of that length.
    """
    tokens = [torch.tensor(tokenizer(t, verbose=False)["input_ids"], dtype=torch.int64) for t in texts if t.strip()]
    long = [ids for ids in tokens if len(ids) >= length]
    if not long:
        longest = max((len(ids) for ids in tokens), default=0)
        raise EvaluationError(
            f"{name}: the longest of {len(tokens)} documents has {longest} tokens, wanted at least one of {length}; "
            "give more text, or shorter lengths."
        )
    share = [count // len(long) + (number < count % len(long)) for number in range(len(long))]
    windows = [_windows(ids, wanted, length) for ids, wanted in zip(long, share, strict=True)]
    rounds = range(max(len(found) for found in windows))
    return Text(name, tuple(found[turn] for turn in rounds for found in windows if turn < len(found)))


def check_same(original: Any, patched: Any) -> None:
    """Check that two tokenizers have the same vocabulary and give the same tokens.

    Raises:
        EvaluationError: losses of the two models would be of different tokens.
    """
    one, other = original.get_vocab(), patched.get_vocab()
    if one != other:
        differing = sorted({*one, *other}, key=str)
        differing = [token for token in differing if one.get(token) != other.get(token)]
        first = differing[0]
        raise EvaluationError(
            f"the tokenizers differ: {len(one)} and {len(other)} tokens, {len(differing)} of them not the same (such "
            f"as {first!r}: {one.get(first)} and {other.get(first)}); only models of one tokenizer can be compared "
            "token by token."
        )
    ids, others = (each(PROBE, verbose=False)["input_ids"] for each in (original, patched))
    if ids != others:
        raise EvaluationError(
            f"the tokenizers have one vocabulary and split text differently (probe: {ids[:8]} ... and {others[:8]} "
            "...); give both models the tokenizer that the original was trained with."
        )


def _windows(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """Return up to ``count`` disjoint windows, spread evenly."""
    room = len(ids) // length
    count = min(count, room)
    starts = [number * (len(ids) - length) // max(1, count - 1) for number in range(count)]
    return [ids[start : start + length] for start in starts]
