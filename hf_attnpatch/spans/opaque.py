"""Remapped attention as an opaque torch operation, so that ``torch.compile(fullgraph=True)`` accepts it.

Which flash calls are made depends on where the rows start, which no graph contains. As an operation of its own it fits
into any graph, and computes the same as outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import spanned
from ..functional.rerotation import RotaryPlanes
from ..functional.spans import Remapping

_SPANS: list[Remapping] = []  # remappings, indexed by the number that graphs contain


def number_of(span: Remapping) -> int:
    """Return the number that stands for a remapping in a graph; equal ones share it."""
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
        query: (batch, heads, q, d), as the model rotated them.
        key: (batch, kv heads, k, d), likewise.
        value: (batch, kv heads, k, d_v).
        places: position of each key, (batch or 1, k), -1 where there is none.
        sinks: a score for each head that takes its share of the weights, (heads,); None for none.
        frequencies: (planes,), radians per position.
        span: a number from :func:`number_of`.
        interleaved: see :class:`RotaryPlanes`.
        first: see :class:`RotaryPlanes`.
        scale: factor on the scores.

    Returns:
        (batch, heads, q, d_v).
    """
    turning = RotaryPlanes(frequencies, interleaved, first)
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
    turning = RotaryPlanes(frequencies, interleaved, first)
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
