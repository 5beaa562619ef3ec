"""Torch's flash kernels with the log-sum-exp that ``scaled_dot_product_attention`` keeps to itself, and their backward.

Given the output and the log-sum-exp of attention over all keys, the backward pass of a part of the keys is that
part's share of the whole (2205.14135, section 3.1), so that attention merged from parts needs no kernel of its own.

Only the CPU's kernel ran. What is here for CUDA (flash for half precision, the memory-efficient kernel for fp32) was
written against torch's schemas and did not run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

_aten: Any = torch.ops.aten
_on_cpu: Callable[..., tuple[Tensor, Tensor]] = _aten._scaled_dot_product_flash_attention_for_cpu
_back_on_cpu: Callable[..., tuple[Tensor, Tensor, Tensor]] = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_HALF = (torch.float16, torch.bfloat16)


def forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d).
        value: (batch, kv heads, k, d).
        causal: query i sees the keys up to i; there are as many of them as queries then.
        scale: on the inner products.
        mask: added to the scores, beside causality, (batch or 1, heads or 1, q or 1, k); no gradient flows into it.

    Returns:
        Output (batch, heads, q, d) and log-sum-exp (batch, heads, q), in fp32 (fp64 for fp64).
    """
    if query.device.type == "cpu":
        return _on_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    width, bias, (query, key, value) = query.shape[-1], _bias(mask, query, key), _laid_out(query, key, value)
    if query.dtype in _HALF and bias is None:
        out, total, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    else:
        out, total, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, causal, scale=scale
        )
    return out[..., :width], total[..., : query.shape[2]]


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; ``out`` and ``total`` may be those of more keys than these."""
    grad = grad.contiguous()  # that of a sum is one number, expanded, which no kernel takes
    if query.device.type == "cpu":
        return _back_on_cpu(grad, query, key, value, out, total, 0.0, causal, attn_mask=mask, scale=scale)
    bias = _bias(mask, query, key)
    width, groups = query.shape[-1], query.shape[1] // key.shape[1]
    grad, out = (F.pad(t, (0, -width % 8)) for t in (grad, out))
    query, key, value = _laid_out(query, key, value)
    sizes = (query.shape[2], key.shape[2])
    state = torch.zeros((), dtype=torch.int64, device=query.device)  # of a random generator that drops nothing
    if query.dtype in _HALF and bias is None:
        found = _aten._scaled_dot_product_flash_attention_backward(
            *(grad, query, key, value, out, total, None, None, *sizes, 0.0, causal, state, state), scale=scale
        )
    else:
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *(grad, query, key, value, bias, out, total, state, state, 0.0, [True, True, True, False], causal),
            scale=scale,
        )
    of_query, *rest = (t[..., :width] for t in found[:3])
    of_key, of_value = (t.unflatten(1, (-1, groups)).sum(2) for t in rest)
    return of_query, of_key, of_value


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a mask as CUDA's kernel takes it: written out, in the dtype of the queries, rows of a multiple of 8."""
    if mask is None:
        return None
    keys = key.shape[2]
    aligned = F.pad(mask.to(query.dtype), (0, -keys % 8))[..., :keys]
    return aligned.expand(*query.shape[:3], keys)


def _laid_out(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each query head its key head, and every head a width that CUDA's kernels take."""
    groups = query.shape[1] // key.shape[1]
    wide = (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    query, key, value = (F.pad(t, (0, -t.shape[-1] % 8)) for t in wide)
    return query, key, value
