"""Positions that a caller gives, where distances are worked out from the order of the tokens: both have to agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.roles import Arguments, Roles

Way = tuple[str, int]  # what positions count, and from where


class Counting:
    """Forward pre-hook of a decoder: refuses positions that leave some out, begin anew, or go on elsewhere.

    Positions may count the tokens of each row or the columns of the batch, from any number, in every call that goes on
    with a cache alike; the cache carries which.

    Args:
        roles: of the arguments of its forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers from tensors: never part of a graph
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look, and change nothing."""
        named = self.roles.bind(args, kwargs)
        cache, positions = named.get(words.CACHE), named.get(words.POSITIONS)
        alone = named.get(words.MASK) is None and cache is None  # there, transformers reads documents from positions
        if alone or (cache is None and positions is None):
            return
        past, found = cached(cache), _ways(named)
        if past and found is not None:
            found = found & getattr(cache, "attnpatch_counting", found)
        if found is not None and not found:
            raise AttnPatchError(
                f"{type(module).__name__}: position_ids with gaps, several axes (images), documents that begin anew, "
                "or other ones than the cache was filled with; distances are counted here from token to token. Pass "
                "none, or positions that count up by one (no position skipping: train so before this patch)."
            )
        if cache is not None and found is not None:
            cache.attnpatch_counting = found


def _ways(named: Arguments) -> frozenset[Way] | None:
    """Return what the positions of a call count; None where it has no tokens to tell by."""
    given = named.get(words.TOKENS)
    given = named.get(words.EMBEDDINGS) if given is None else given
    if not isinstance(given, Tensor):
        return None
    past, (batch, new) = cached(named.get(words.CACHE)), given.shape[:2]
    columns = (past + torch.arange(new)).expand(batch, -1)
    mask, positions = named.get(words.MASK), named.get(words.POSITIONS)
    keep, number = torch.ones(batch, new, dtype=torch.bool), columns
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= past + new:
        whole = mask[:, : past + new].ne(0).cpu()
        keep, number = whole[:, past:], whole.long().cumsum(1)[:, past:] - 1
    if not bool(keep.any()):
        return None
    axes = columns[None] if positions is None else positions.cpu().long().reshape(-1, *positions.shape[-2:])
    axes = axes.expand(-1, batch, -1)[:, keep]  # axes, tokens
    if axes.shape[0] > 1 and not bool((axes == axes[:1]).all()):
        return frozenset()
    shifts = {"tokens": axes[0] - number[keep], "columns": axes[0] - columns[keep]}
    return frozenset((name, int(by[0])) for name, by in shifts.items() if bool((by == by[0]).all()))
