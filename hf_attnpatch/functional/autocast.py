"""Kernels under ``torch.autocast``, which casts their operands when they are called: too late for further dimensions.

Positions are split into as many numbers as the dtype needs that they are multiplied in. Where rotary angles leave
queries and keys in float32, autocast would round what was split for float32; so they are cast first, and what is added
to scores in float32 stays so.
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
    """Make a function of queries, keys and values compute in the dtype that autocast chooses, and autocast nothing."""

    @functools.wraps(attention)
    def cast(query: Tensor, key: Tensor, value: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        kind = query.device.type
        if not torch.is_autocast_enabled(kind) or query.dtype == torch.float64:
            return attention(query, key, value, *args, **kwargs)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return attention(query.to(dtype), key.to(dtype), value.to(dtype), *args, **kwargs)

    return cast
