"""Attention under ``torch.autocast``, which casts operands inside kernels: too late for the extra dimensions.

Positions are split into as many numbers as the dtype of the product needs. If rotary angles leave queries and keys in
float32, autocast would round what was split for float32. So they are cast first, and float32 biases stay float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
Attention = Callable[Concatenate[Tensor, Tensor, Tensor, P], Tensor]


def outside_autocast(attention: Attention[P]) -> Attention[P]:
    """Make a function of queries, keys and values compute in autocast's dtype, with autocast disabled inside."""

    @functools.wraps(attention)
    def cast(query: Tensor, key: Tensor, value: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        kind = query.device.type
        if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
            return attention(query, key, value, *args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return attention(query.to(dtype), key.to(dtype), value.to(dtype), *args, **kwargs)

    return cast
