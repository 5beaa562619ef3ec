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
from ..upstream.partitioned import shape_of
from .modules import NoPositions, share

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
        heads, _, size = shape_of(self.weight)
        return f"heads={heads}, size={size}, theta={self.theta:g}"

    def look_back(self, scale: float, reach: int) -> None:
        """Begin with ALiBi's preference for what is near (its slopes, within ``reach`` tokens), by v W alone."""
        heads, head_dim, size = self.weight.shape
        wanted = relative.recency(slopes(heads), scale, size, self.theta, reach) / (_LOUD * head_dim)
        with torch.no_grad():
            self.v.fill_(_LOUD)
            self.weight.copy_(wanted[:, None].expand(-1, head_dim, -1))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, v and W: called rather than read, as Accelerate and DeepSpeed bring parameters here for a call."""
        return self.u, self.v, self.weight

    def of(self, query: Tensor, scale: float, module: nn.Module | None = None) -> Term:
        """Return the terms of some queries.

        Args:
            query: (batch, heads, q, d).
            scale: by which their scores are multiplied.
            module: the attention module, which says which heads a rank of tensor parallelism has.

        Raises:
            AttnPatchError: heads are missing, or they would be trained on several ranks, each on its own share.
        """
        u, v, weight = self()
        mine = share(module, query.shape[1], u.shape[0])
        if query.shape[1] != u.shape[0] and torch.is_grad_enabled() and u.requires_grad:
            raise AttnPatchError(
                f"{CHILD}: under tensor parallelism each rank would train its own heads' terms, and none "
                "would know the others'; train with FSDP or DeepSpeed, or freeze them (requires_grad_(False))."
            )
        return Term(u[mine], v[mine], weight[mine], self.theta, query, scale)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sight: Sight,
        scale: float,
        dropout: float,
        module: nn.Module | None = None,
    ) -> Tensor:
        """Attend by torch's kernel; the arguments are those of :func:`hf_attnpatch.functional.biased.attend`."""
        return _attend(query, key, value, self, sight, scale, dropout, module)


@outside_autocast
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: RelativeTerms,
    sight: Sight,
    scale: float,
    dropout: float,
    module: nn.Module | None,
) -> Tensor:
    term = terms.of(query, scale, module)
    return attend_extended(term.content, key, value, term, sight, scale, dropout)


@dataclass(frozen=True)
class Term:
    """The terms of some queries; an :class:`hf_attnpatch.functional.biased.Extension`.

    Attributes:
        u: of the paper, (heads, d).
        v: of the paper, (heads, d).
        weight: W, (heads, d, size).
        theta: base of R's wavelengths.
        query: (batch, heads, q, d), as the module hands them to its attention function.
        scale: by which scores are multiplied.
    """

    u: Tensor
    v: Tensor
    weight: Tensor
    theta: float
    query: Tensor
    scale: float

    @property
    def content(self) -> Tensor:
        """The queries with u added, whose product with keys is the other part of the scores."""
        return self.query + self.u[:, None].to(self.query.dtype)

    def columns(self, here: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """The further dimensions of queries at these places, and of so many keys; a multiple of eight."""
        like = self.query
        left = relative.query_columns(like, *self._given(), here, self.theta).to(like.dtype)
        right = relative.key_columns(num_keys, self.weight.shape[2], self.theta, like.device).to(like.dtype)
        blank = -left.shape[-1] % 8
        return nn.functional.pad(left, (0, blank)), nn.functional.pad(right, (0, blank))

    def rows(self, here: Tensor, num_keys: int) -> Tensor:
        """The same multiplied out and scaled."""
        return self.scale * relative.bias_rows(self.query, *self._given(), here, num_keys, self.theta)

    def _given(self) -> tuple[Tensor, Tensor]:
        return self.v.to(self.query.dtype), self.weight.to(self.query.dtype)


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
