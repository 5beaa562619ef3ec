"""A model's answers to prompts, in batches, with shared prefixes read once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...progress import track
from ..announcing import listener
from ..generation import greedy, prefill
from ..mode import device_of, measuring
from .examples import Example
from .task import Task

_STEP = 8  # reading so many tokens more costs about as much as one more step of decoding
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest logit; rounding in the shorter types: below
_COARSE = 3e-2


class Answers:
    """Asks a model; counts the tokens of prompts and those saved by shared prefixes.

    A prefix is shared only where that is exact: for every length, one row is also read in one piece, and where the two
    disagree by more than rounding (dynamic rotary frequencies, say), the prompts of this length are read whole, as are
    all where a model chooses its angles by the length of a request.

    Args:
        model: a causal language model with a cache.
        tokenizer: its tokenizer.
        task: what is asked.
        new_tokens: tokens of an answer, at most.
        batch_tokens: tokens of prompts and answers in a batch, at most; one prompt at least.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, task: Task, new_tokens: int, batch_tokens: int) -> None:
        self.model, self.tokenizer, self.task, self.new_tokens = model, tokenizer, task, new_tokens
        self.batch_tokens = batch_tokens
        self.tokens = self._tokens_read = 0
        self._ends = end_tokens(model, tokenizer)
        self._stem: tuple[Tensor, Any] | None = None  # the last shared prefix, shape (1, tokens), and its cache
        self._exact: dict[int, bool] = {}
        self._shares = listener(model) is None  # a cache that was begun for one length serves no other

    def __call__(self, examples: Sequence[Example]) -> Iterator[tuple[Example, str]]:
        """Yield every example with its answer, up to where the model ends it.

        Raises:
            EvaluationError: the model has no cache, no position for so many tokens, or logits that are not finite.
        """
        with measuring(self.model):
            for part, shared in track(batches(examples, self.batch_tokens, self.new_tokens), self.task.name):
                ids = torch.tensor([example.ids for example in part], device=device_of(self.model))  # batch, length
                added = self._decoded(ids, shared, part)
                for example, row in zip(part, added.tolist(), strict=True):
                    yield example, self._text(row)
        self._stem = None

    def _decoded(self, ids: Tensor, shared: int, part: Sequence[Example]) -> Tensor:
        def done(added: Tensor) -> bool:
            return all(self._settled(row, example) for row, example in zip(added.tolist(), part, strict=True))

        self.tokens += ids.numel()
        past = None
        if shared and self._shares and self._is_exact(ids[:1], shared):
            past = copy.deepcopy(self._cached(ids[:1, :shared]))
            past.batch_repeat_interleave(len(ids))
        else:
            shared = 0
        self._tokens_read += ids[:, shared:].numel()
        return greedy(self.model, ids[:, shared:], self.new_tokens, past=past, done=done)

    def _settled(self, row: list[int], example: Example) -> bool:
        ended = any(token in self._ends for token in row)
        return ended or (self.task.monotone and self.task.points(self._text(row), example.answers) == 100.0)

    def _text(self, row: list[int]) -> str:
        end = next((n for n, token in enumerate(row) if token in self._ends), len(row))
        return str(self.tokenizer.decode(row[:end], skip_special_tokens=True))

    def _is_exact(self, ids: Tensor, count: int) -> bool:
        """Return whether reading a prefix first gives the same logits as reading all at once; tried once per length."""
        length = ids.shape[1]
        if length not in self._exact:
            whole, past = self._read(ids, None)
            self._exact[length] = False
            if hasattr(past, "batch_repeat_interleave"):
                parts, _ = self._read(ids[:, count:], copy.deepcopy(self._cached(ids[:, :count])))
                tolerance = _TOLERANCE.get(whole.dtype, _COARSE) * float(whole.abs().max())
                self._exact[length] = float((whole - parts).abs().max()) <= tolerance
        return self._exact[length]

    def _read(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        self._tokens_read += ids.numel()
        return prefill(self.model, ids, past)

    @property
    def reused(self) -> int:
        """Tokens of prompts that were not read again, minus those read to check that this is exact."""
        return max(0, self.tokens - self._tokens_read)

    def _cached(self, ids: Tensor) -> Any:
        """Return the cache of a prefix, extended from the last one if that is its beginning."""
        before, past = self._stem or (ids[:, :0], None)
        if not torch.equal(ids[:, : before.shape[1]], before):
            before, past = ids[:, :0], None
        if before.shape[1] < ids.shape[1]:
            _, past = self._read(ids[:, before.shape[1] :], past)
        self._stem = (ids, past)
        return past


def batches(examples: Sequence[Example], batch_tokens: int, new_tokens: int) -> list[tuple[list[Example], int]]:
    """Return prompts in batches of one length, each with the number of first tokens to read once for all rows.

    Prompts of one depth make batches of their own where they share so much that it outweighs decoding once more. What
    is read once for a batch begins what is read once for the next, so that it only grows with the depth.
    """
    groups: dict[tuple[int, int], dict[float, list[Example]]] = {}
    for example in examples:
        groups.setdefault((example.length, len(example.ids)), {}).setdefault(example.depth or 0.0, []).append(example)
    found: list[tuple[list[Example], int]] = []
    for (length, _), by_depth in sorted(groups.items(), key=lambda item: item[0]):
        rows, loose, sharing = max(1, batch_tokens // length), [], []
        for _, same in sorted(by_depth.items()):
            if _common(same) * (len(same) - 1) >= _STEP * new_tokens:
                sharing += _chunks(same, rows)
            else:
                loose += same
        found += [(part, 0) for part in _chunks(loose, rows)]
        for number, part in enumerate(sharing):
            own, both = _common(part), _common([each for near in sharing[number : number + 2] for each in near])
            found.append((part, both if both > own // 2 else own))
    return found


def _chunks(examples: Sequence[Example], rows: int) -> list[list[Example]]:
    return [list(examples[start : start + rows]) for start in range(0, len(examples), rows)]


def _common(examples: Sequence[Example]) -> int:
    """Return how many first tokens the prompts share, never including the last token of a prompt."""
    low, high = min(e.ids for e in examples), max(e.ids for e in examples)
    pairs = enumerate(zip(low, high, strict=False))
    return min(next((n for n, (a, b) in pairs if a != b), len(low)), len(low) - 1, len(high) - 1)


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the model's generation settings and its tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, (list, tuple)) else [found]
    return frozenset(token for token in [*listed, getattr(tokenizer, "eos_token_id", None)] if token is not None)
