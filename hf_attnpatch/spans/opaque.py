"""Attention at changed distances as one operation of torch, into which ``torch.compile`` does not look.

Which flash calls are made depends on where the rows begin, which is in no graph. As an operation of its own it stands
in any graph, ``fullgraph=True`` included, and computes what it does elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import spanned
from ..functional.rerotation import Turning
from ..functional.spans import Span

_SPANS: list[Span] = []  # by the number under which a graph knows them


def number_of(span: Span) -> int:
    """Return the number under which a graph knows a kind of distance; equal ones have one number."""
    if span not in _SPANS:
        _SPANS.append(span)
    return _SPANS.index(span)


@torch.library.custom_op("hf_attnpatch::attend_at_distances", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sinks: Tensor | None,
    frequencies: Tensor,
    span: int,
    interleaved: bool,
    first: int,
    scale: float,
) -> Tensor:
    """Attend; see :func:`hf_attnpatch.functional.spanned.attend`.

    Args:
        query: (batch, heads, q, d), as the model turned them.
        key: (batch, kv heads, k, d), likewise.
        value: (batch, kv heads, k, d_v).
        places: position of each key, (batch or 1, k), -1 where there is none.
        sinks: a score for each head that takes its share of the weights, (heads,); None for none.
        frequencies: (planes,), radians per position.
        span: what :func:`number_of` returned.
        interleaved: see :class:`Turning`.
        first: see :class:`Turning`.
        scale: on the inner products.

    Returns:
        (batch, heads, q, d_v).
    """
    turning = Turning(frequencies, interleaved, first)
    return spanned.attend(query, key, value, places, _SPANS[span], turning, scale, sinks=sinks).contiguous()


@attend.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


@torch.library.custom_op("hf_attnpatch::attend_at_distances_backward", mutates_args=())
def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    sinks: Tensor | None,
    frequencies: Tensor,
    span: int,
    interleaved: bool,
    first: int,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of queries, keys, values and sinks; attention is computed once more."""
    given = (query, key, value) if sinks is None else (query, key, value, sinks)
    states = [t.detach().requires_grad_() for t in given]
    more = None if sinks is None else states[3]
    turning = Turning(frequencies, interleaved, first)
    with torch.enable_grad():
        out = spanned.attend(states[0], states[1], states[2], places, _SPANS[span], turning, scale, sinks=more)
        return [each.contiguous() for each in torch.autograd.grad(out, states, grad)]


@_gradients.register_fake
def _shapes(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, places: Tensor, sinks: Tensor | None, *_: Any
) -> list[Tensor]:
    given = (query, key, value) if sinks is None else (query, key, value, sinks)
    return [t.new_empty(t.shape) for t in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = list(_gradients(grad, *ctx.saved_tensors, *ctx.settings))
    of_sinks = found.pop() if len(found) > 3 else None
    return (*found, None, of_sinks, *(None,) * 5)


attend.register_autograd(_backward, setup_context=_keep)
