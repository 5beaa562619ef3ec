"""Transformer-XL's position terms as a child of each attention module: the parameters u, v and W."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..functional import relative
from ..functional.alibi import slopes
from ..functional.autocast import outside_autocast
from ..functional.biased import Sight, attend_extended
from .modules import NoPositions

PREFIX = "relative_xl_"  # of the attention functions that add the terms, before the name of the kernel they call
CHILD = "relative_xl"  # of an attention module; what its parameters' keys in a checkpoint end with
_LOUD = 4.0  # elements of v where a bias is written into v W: what queries add to v counts little beside it


class RelativeTerms(nn.Module):
    """u, v and W of the paper, by query head.

    Args:
        heads: of queries.
        head_dim: of a head.
        size: dimensions of R.
        theta: base of its wavelengths.
        like: for device and dtype.
    """

    def __init__(self, heads: int, head_dim: int, size: int, theta: float, like: Tensor):
        super().__init__()
        self.theta = theta
        self.u = nn.Parameter(like.new_zeros(heads, head_dim))
        self.v = nn.Parameter(like.new_zeros(heads, head_dim))
        self.weight = nn.Parameter(like.new_zeros(heads, head_dim, size))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"heads={self.weight.shape[0]}, size={self.weight.shape[2]}, theta={self.theta:g}"

    def look_back(self, scale: float, reach: int) -> None:
        """Begin with ALiBi's preference for what is near (its slopes, within ``reach`` tokens), by v W alone."""
        heads, head_dim, size = self.weight.shape
        wanted = relative.recency(slopes(heads), scale, size, self.theta, reach) / (_LOUD * head_dim)
        with torch.no_grad():
            self.v.fill_(_LOUD)
            self.weight.copy_(wanted[:, None].expand(-1, head_dim, -1))

    def of(self, query: Tensor, scale: float) -> Term:
        """Return the position term of these queries, (batch, heads, q, d), whose scores are multiplied by ``scale``."""
        return Term(self, query, scale)

    def content(self, query: Tensor) -> Tensor:
        """Add u."""
        return query + self.u[:, None].to(query.dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sight: Sight, scale: float, dropout: float) -> Tensor:
        """Attend by torch's kernel; the arguments are those of :func:`hf_attnpatch.functional.biased.attend`."""
        return _attend(query, key, value, self, sight, scale, dropout)


@outside_autocast
def _attend(
    query: Tensor, key: Tensor, value: Tensor, terms: RelativeTerms, sight: Sight, scale: float, dropout: float
) -> Tensor:
    return attend_extended(terms.content(query), key, value, terms.of(query, scale), sight, scale, dropout)


@dataclass(frozen=True)
class Term:
    """The position term of some queries; an :class:`hf_attnpatch.functional.biased.Extension`.

    Attributes:
        terms: u, v and W.
        query: (batch, heads, q, d), as the module hands them to its attention function.
        scale: by which scores are multiplied.
    """

    terms: RelativeTerms
    query: Tensor
    scale: float

    def columns(self, here: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """The further dimensions of queries at these places, and of so many keys; a multiple of eight."""
        terms, like = self.terms, self.query
        left = relative.query_columns(like, *self._given(), here, terms.theta).to(like.dtype)
        right = relative.key_columns(num_keys, terms.weight.shape[2], terms.theta, like.device).to(like.dtype)
        blank = -left.shape[-1] % 8
        return nn.functional.pad(left, (0, blank)), nn.functional.pad(right, (0, blank))

    def rows(self, here: Tensor, num_keys: int) -> Tensor:
        """The same multiplied out and scaled."""
        return self.scale * relative.bias_rows(self.query, *self._given(), here, num_keys, self.terms.theta)

    def _given(self) -> tuple[Tensor, Tensor]:
        return self.terms.v.to(self.query.dtype), self.terms.weight.to(self.query.dtype)


def relative_of(module: nn.Module) -> RelativeTerms | None:
    """Return the terms of an attention module that this package gave some, or None.

    Where PEFT trains a copy of them (``modules_to_save``), that copy, while its adapter is on.

    Raises:
        AttnPatchError: something else stands in their place.
    """
    found: Any = module._modules.get(CHILD)
    if hasattr(found, "original_module"):
        active = [] if found.disable_adapters else [n for n in found.active_adapters if n in found.modules_to_save]
        found = found.modules_to_save[active[0]] if active else found.original_module
    if found is None or isinstance(found, (RelativeTerms, NoPositions)):
        return found if isinstance(found, RelativeTerms) else None
    raise AttnPatchError(
        f"{type(module).__name__}: its {CHILD} is a {type(found).__name__}, which attention cannot read."
    )


def default_size(head_dim: int) -> int:
    """As many dimensions of R as the head has, made even: the kernel's heads become twice as wide, no more."""
    return 2 * math.ceil(head_dim / 2)
