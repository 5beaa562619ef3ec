"""Merging and replicating key-value heads.

Rows are the output rows of a key or value projection, one block per head: ``(num_heads, head_dim, ...)``; a bias
or a per-head norm weight has the same two leading axes and nothing behind.
"""

from collections.abc import Callable

import torch
from torch import Tensor

METHODS = ("first", "mean", "mean_rescaled")


def group_heads(rows: Tensor, num_groups: int, method: str) -> Tensor:
    """Merge adjacent heads into ``num_groups`` heads.

    ``first`` keeps the first head of each group, ``mean`` averages them (Ainslie et al., 2305.13245, section 2.1),
    ``mean_rescaled`` averages and then restores each row's mean norm over the heads that went in, which an average of
    nearly orthogonal vectors loses.

    Args:
        rows: per-head rows, shape (num_heads, head_dim, ...), any floating dtype; computed in fp32 or wider.
        num_groups: heads to keep; divides ``num_heads``.
        method: one of ``METHODS``.

    Returns:
        Rows of shape (num_groups, head_dim, ...) in the dtype of ``rows``; the rows themselves, not a copy, where
        there is nothing to merge.
    """
    num_heads = rows.shape[0]
    assert num_heads % num_groups == 0, (num_heads, num_groups)
    if num_groups == num_heads:
        return rows
    grouped = rows.reshape(num_groups, num_heads // num_groups, *rows.shape[1:])  # (groups, members, head_dim, ...)
    if method == "first":
        return grouped[:, 0].clone()
    return _MERGES[method](grouped.to(_wide(rows.dtype))).to(rows.dtype)


def replicate_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Copy every head so that there are ``num_heads``: head h of the result is head h // repeats of ``rows``.

    This is the order in which transformers repeats key-value heads, so attention is unchanged.
    """
    assert num_heads % rows.shape[0] == 0, (rows.shape[0], num_heads)
    return rows.repeat_interleave(num_heads // rows.shape[0], dim=0)


def resize_heads(rows: Tensor, num_heads: int, method: str) -> Tensor:
    """Merge or replicate ``rows`` to ``num_heads`` heads, whichever direction that is."""
    if num_heads > rows.shape[0]:
        return replicate_heads(rows, num_heads)
    return group_heads(rows, num_heads, method)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _mean(grouped: Tensor) -> Tensor:
    return grouped.mean(dim=1)


def _mean_rescaled(grouped: Tensor) -> Tensor:
    mean = grouped.mean(dim=1)
    if grouped.dim() == 3:  # a bias or norm weight: one number per row has no direction to restore
        return mean
    wanted = grouped.norm(dim=-1, keepdim=True).mean(dim=1)
    found = mean.norm(dim=-1, keepdim=True)
    return torch.where(found > 0, mean * (wanted / found.clamp_min(torch.finfo(mean.dtype).tiny)), mean)


_MERGES: dict[str, Callable[[Tensor], Tensor]] = {"mean": _mean, "mean_rescaled": _mean_rescaled}
