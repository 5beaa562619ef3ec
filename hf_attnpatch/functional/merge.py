"""Merges attention over disjoint sets of keys by log-sum-exp.

A flash kernel returns the log of the sum of exponentiated scores beside its output. Two such pairs over disjoint keys
give the pair over both, exactly (2205.14135, section 3.1). Computed in fp32 whatever the dtype of the outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # output (..., q, d), log-sum-exp (..., q) in fp32; -inf where a query sees no key


def merge(first: Pair, second: Pair) -> Pair:
    """Merge attention over two disjoint sets of keys.

    Returns:
        The output in the dtype of ``first``, and its log-sum-exp.
    """
    (one, a), (two, b) = first, second
    total = torch.logaddexp(a, b)
    shares = ((log - total).exp().nan_to_num()[..., None] for log in (a, b))  # nan where both are empty
    left, right = (share * out for share, out in zip(shares, (one, two), strict=True))
    return (left + right).to(one.dtype), total
