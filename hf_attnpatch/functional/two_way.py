"""Bidirectional attention with an ALiBi bias: two causal passes of a flash kernel, merged.

|i - j| has full rank, so that no few dimensions make it; but among past keys it is i - j and among later keys j - i,
and each of them is an inner product (:mod:`.alibi`). The later keys are the past of the reversed sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from .alibi import columns, extended, offset
from .merge import merge

_forward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)


def two_way(
    query: Tensor, key: Tensor, value: Tensor, slope: Tensor, scale: float, keep: Tensor | None = None
) -> Tensor:
    """Attend to all keys with the bias -slope |i - j|, in linear memory, forwards and backwards.

    Args:
        query: (batch, heads, length, d), on the CPU.
        key: (batch, heads, length, d).
        value: (batch, heads, length, d_v).
        slope: (heads,), fp64.
        scale: on the inner products.
        keep: (batch, length), bool: keys that are no padding; None if all are.
    """
    length, width = query.shape[2], value.shape[-1]
    behind = None if keep is None else keep[:, 1:].flip(1)
    turned = (
        query[:, :, :-1].flip(2),
        key[:, :, 1:].flip(2),
        value[:, :, 1:].flip(2),
    )  # each sees the keys after it
    states: list[Tensor] = []
    shifts = []
    for pair, n, kept in (((query, key, value), length, keep), (turned, length - 1, behind)):
        here = torch.arange(n)[None]
        states += extended(*pair, columns(slope, scale, here, n, query.dtype, kept))
        shifts.append(offset(slope, scale, here, n, query.dtype).to(torch.promote_types(query.dtype, torch.float32)))
    shifts[1] += slope[:, None]  # the nearest of the later keys is at distance 1
    out: Tensor = _TwoWay.apply(scale, *shifts, *states)  # type: ignore[no-untyped-call]  # torch's
    return out[..., :width]


class _TwoWay(torch.autograd.Function):
    """The kernel's own backward serves each pass: given the merged output and log-sum-exp, it is that of the whole."""

    @staticmethod
    def forward(ctx: Any, scale: float, shift: Tensor, beyond: Tensor, *states: Tensor) -> Tensor:
        """Two passes; ``shift`` and ``beyond`` are what their scores have too much, (batch, heads, length)."""
        past, before = _forward(*states[:3], 0.0, True, scale=scale)
        future, after = _forward(*states[3:], 0.0, True, scale=scale)
        rest, more = F.pad(future.flip(2), (0, 0, 0, 1)), F.pad((after - beyond).flip(2), (0, 1), value=-torch.inf)
        out, total = merge((past, before - shift), (rest, more))
        ctx.scale = scale
        ctx.save_for_backward(out, total, shift, beyond, *states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The merged log-sum-exp, with what this pass has too much, makes each pass give its share."""
        out, total, shift, beyond, *states = ctx.saved_tensors
        past = _backward(grad.contiguous(), *states[:3], out, total + shift, 0.0, True, scale=ctx.scale)
        turned = [t[:, :, :-1].flip(2).contiguous() for t in (grad, out, total)]
        future = _backward(turned[0], *states[3:], turned[1], turned[2] + beyond, 0.0, True, scale=ctx.scale)
        return None, None, None, *past, *future
