"""Losses of chosen tokens, without computing the logits of all others.

A vocabulary of 49,152 words takes 1.6 GB of float32 logits for 8,192 tokens. So the output head is given the hidden
states of the targets only, and these in parts: a hook before the head, there for the length of a call, narrows its
input. What a family does to logits after its head (a soft cap, a scale) is its own forward's, and stays exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..interruption import removing
from ..upstream import words
from ..upstream.roles import predicted, run

IGNORED = -100  # a label that does not count, as everywhere in torch
_ELEMENTS = 2**25  # logits at a time: 128 MiB in float32, of which the loss makes a copy or two


def token_losses(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of the last tokens of each row.

    Args:
        model: a causal language model in eval mode; returns ``.logits``.
        ids: shape (batch, length), int64, nothing padded.
        labels: what is to be predicted at the last ``targets`` positions, shape (batch, targets), int64, where -100
            does not count; ``targets`` is less than the length.

    Returns:
        Nats, shape (batch, targets), float32, 0 where the label does not count.
    """
    stop, targets = ids.shape[1] - 1, labels.shape[1]
    parts, end = [], targets
    for logits in span_logits(model, ids, stop - targets, stop, positions_at_once(model, len(ids))):
        parts.append(_cross_entropy(logits, labels[:, end - logits.shape[1] : end]))
        end -= logits.shape[1]
    return torch.cat(parts[::-1], dim=1)


def span_logits(model: nn.Module, ids: Tensor, start: int, stop: int, step: int) -> Iterator[Tensor]:
    """Yield the logits of positions ``start`` to ``stop`` - 1 in parts of at most ``step``, the last part first.

    Args:
        model: in eval mode, gradients off.
        ids: shape (batch, length), int64, nothing padded.
        start: first position wanted.
        stop: one after the last.
        step: positions at a time; see :func:`positions_at_once`.

    Yields:
        Shape (batch, positions, vocabulary), in the model's dtype.
    """
    edges = [(max(start, end - step), end) for end in range(stop, start, -step)]
    hidden: list[Tensor] = []
    with _before_head(model, lambda states: _taken(states, ids.shape, (start, stop), edges[0][0], hidden)):
        # batch, part or length, vocabulary
        logits = predicted(forward(model, {words.TOKENS: ids, words.USE_CACHE: False}))
    if len(hidden) > 1:  # a head that is used more than once: which of the calls made the logits is not known
        hidden.clear()
        logits = predicted(forward(model, {words.TOKENS: ids, words.USE_CACHE: False}))
    if not hidden:  # no head that can be narrowed: all logits are here
        yield from (logits[:, low:high] for low, high in edges)
        return
    yield logits
    for low, high in edges[1:]:
        part = hidden[0][:, low - start : high - start]  # batch, positions, width
        with _before_head(model, lambda _, part=part: part):  # a default: a closure would see the next
            logits = predicted(forward(model, {words.TOKENS: ids[:, :1], words.USE_CACHE: False}))
        yield logits


def positions_at_once(model: nn.Module, batch: int) -> int:
    """Return how many positions of a batch may have logits at a time."""
    weight = getattr(_head(model), "weight", None)
    return max(1, _ELEMENTS // (batch * weight.shape[0])) if isinstance(weight, Tensor) else 256


def last_logits(model: nn.Module, ids: Tensor, inputs: Mapping[str, Any], count: int = 1) -> tuple[Tensor, Any]:
    """Return the logits of the last ``count`` positions, (batch, count, vocabulary), and the model's whole output."""
    with _before_head(model, lambda states: states[:, -count:] if states.shape[:2] == ids.shape else states):
        output = forward(model, {words.TOKENS: ids}, **inputs)
    return predicted(output)[:, -count:], output


def forward(model: nn.Module, given: Mapping[str, Any], **more: Any) -> Any:
    """Run the model.

    Args:
        model: or a wrapper around one.
        given: values by role, tokens among them.
        more: further keywords of its forward.

    Raises:
        EvaluationError: it has no positions for so many tokens, or none of these tokens.
    """
    try:
        return run(model, given, **more)
    except IndexError as error:  # a table of tokens or of positions, looked up beyond its end
        _check_tokens(model, given[words.TOKENS], error)
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        raise EvaluationError(
            f"{type(model).__name__}: {tuple(given[words.TOKENS].shape)[1]} tokens were given, and its config says "
            f"max_position_embeddings={limit} ({error}); measure shorter lengths, or give it more positions first."
        ) from error


def _check_tokens(model: nn.Module, ids: Tensor, error: IndexError) -> None:
    getter = getattr(model, "get_input_embeddings", None)
    table = getattr(getter() if getter is not None else None, "weight", None)
    low, high = int(ids.min()), int(ids.max())
    if isinstance(table, Tensor) and not 0 <= low <= high < len(table):
        raise EvaluationError(
            f"{type(model).__name__}: token ids from {low} to {high}, and it knows {len(table)} tokens; tokenize with "
            "this model's own tokenizer."
        ) from error


def _head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return head if isinstance(head, nn.Module) else None


def _taken(states: Tensor, shape: torch.Size, span: tuple[int, int], first: int, hidden: list[Tensor]) -> Tensor:
    """Keep the hidden states of a span and pass on those from ``first``."""
    if states.shape[:2] != shape:
        return states  # flattened, or narrowed by the model itself
    hidden.append(states[:, span[0] : span[1]].clone())  # a view would keep all positions
    return hidden[-1][:, first - span[0] :]


@contextlib.contextmanager
def _before_head(model: nn.Module, change: Any) -> Iterator[None]:
    """Change the input of the output head for the duration of a call, if the model has such a module."""
    head = _head(model)
    if head is None:
        yield
        return
    with removing() as handles:
        handles.append(head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]) if args else None))
        yield


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats by token, batch row by row so that float32 copies of low precision logits stay small."""
    counted = labels != IGNORED
    wanted = labels.clamp(min=0)[..., None]  # batch, targets, 1
    rows = [
        torch.logsumexp(row.float(), dim=-1) - row.gather(-1, want)[..., 0].float()
        for row, want in zip(logits, wanted, strict=True)
    ]
    return torch.where(counted, torch.stack(rows), 0.0)
