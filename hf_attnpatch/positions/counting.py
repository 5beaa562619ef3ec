"""Checks the position ids that a caller passes, where distances are computed from the order of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..edits import AddPreHook, Edit
from ..errors import AttnPatchError
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.roles import Arguments, Roles, roles_of

Way = tuple[str, int]  # what the positions count (tokens or columns), and their first value


class Counting:
    """Forward pre-hook of a decoder: refuses positions that have gaps, restart, or do not continue the cache.

    Positions may count the tokens of each row or the columns of the batch, from any number, the same way in every call
    with one cache; the cache stores which way.

    Args:
        roles: argument roles of its forward.
        turned: whether states were rotated by these positions, so that those of images (several axes) matter, too.
        site: path, below the decoder, of an attention module that computes distances.
        held: returns what makes that module do so, or None if a later patch removed it.
    """

    def __init__(self, roles: Roles, turned: bool, site: str, held: Callable[[nn.Module], object]):
        self.roles, self.turned, self.site, self.held = roles, turned, site, held

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check, and change nothing."""
        if self.held(module.get_submodule(self.site)) is None:
            return
        named = self.roles.bind(args, kwargs)
        cache, positions = named.get(words.CACHE), named.get(words.POSITIONS)
        if positions is None and (cache is None or torch.compiler.is_compiling()):
            return
        if named.get(words.MASK) is None and cache is None:
            return  # transformers derives packed documents from these positions, and makes their mask
        if any(getattr(hook, "gave_positions", False) for hook in module._forward_pre_hooks.values()):
            return  # set by a segment memory, which has checked the caller's
        if self.turned or positions is None or positions.dim() < 3:
            self._check(module, named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numbers from tensors: never part of a graph
    def _check(self, module: nn.Module, named: Arguments) -> None:
        cache, found = named.get(words.CACHE), _ways(named)
        if found is not None and cached(cache):
            found = found & getattr(cache, "attnpatch_counting", found)
        if found is not None and not found:
            raise AttnPatchError(
                f"{type(module).__name__}: position_ids have gaps, several axes (images), or restart for a new "
                f"document, or differ "
                "from those that filled the cache; distances are counted from token to token here. Pass none, or "
                "positions "
                "that count up by one (no position skipping: train so before this patch)."
            )
        if cache is not None and found is not None:
            cache.attnpatch_counting = found


def counted(
    model: PreTrainedModel, paths: Sequence[str], held: Callable[[nn.Module], object], turned: bool = False
) -> Iterator[Edit]:
    """Yield the hook for the module that holds the layers, if it takes positions.

    Args:
        model: the model to patch.
        paths: paths of its attention modules.
        held: see :class:`Counting`.
        turned: see :class:`Counting`.
    """
    parts = paths[0].split(".") if paths else []
    path = ".".join(parts[: max(0, next((n for n, part in enumerate(parts) if part.isdigit()), 0) - 1)])
    roles = roles_of(model.get_submodule(path))
    if paths and roles.takes(words.POSITIONS):
        yield AddPreHook(
            path,
            Counting(roles, turned, paths[0][len(path) :].lstrip("."), held),
            "refuses positions that are not the order of the tokens",
        )


def _ways(named: Arguments) -> frozenset[Way] | None:
    """Return what the positions of a call may count; None if it has no tokens to compare with."""
    given = named.get(words.TOKENS)
    given = named.get(words.EMBEDDINGS) if given is None else given
    if not isinstance(given, Tensor):
        return None
    cache, mask, positions = (named.get(role) for role in (words.CACHE, words.MASK, words.POSITIONS))
    past, (batch, new) = cached(cache), given.shape[:2]
    columns = (past + torch.arange(new)).expand(batch, -1)
    axes = columns[None] if positions is None else positions.cpu().long().reshape(-1, *positions.shape[-2:])
    axes = axes.expand(-1, batch, -1)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):  # finished: padding cannot be told
        return frozenset() if bool((axes.diff(dim=-1) > 1).any()) else None
    keep, number = torch.ones(batch, new, dtype=torch.bool), columns
    if mask is not None and mask.shape[1] >= past + new:
        whole = mask[:, : past + new].ne(0).cpu()
        keep, number = whole[:, past:], whole.long().cumsum(1)[:, past:] - 1
    if not bool(keep.any()):
        return None
    if cache is None:  # no cache to continue: each row may start anywhere
        axes = axes - axes.gather(2, keep.long().argmax(1)[None, :, None].expand(len(axes), -1, 1))
    axes = axes[:, keep]  # axes, tokens
    if axes.shape[0] > 1 and not bool((axes == axes[:1]).all()):
        return frozenset()
    shifts = {"tokens": axes[0] - number[keep], "columns": axes[0] - columns[keep]}
    return frozenset((name, int(by[0])) for name, by in shifts.items() if bool((by == by[0]).all()))
