"""Transformer-XL's relative position terms: the parameters u, v and W of each module, and how kernels add them."""

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
from ..functional.biased import Sight, attend_extended, positions
from ..upstream import words
from ..upstream.partitioned import shape_of
from .call import AttentionCall, Output
from .heads import share
from .kernels import plain_flex, refuse_tensor_mask
from .wrapper import Term, wrapper_of

CHILD = "relative_xl"  # child of an attention module, so part of the parameters' names in a checkpoint
_LOUD = 4.0  # elements of v when a bias is encoded in v W; large, so that the queries' part matters little


class RelativeTerms(nn.Module):
    """The parameters u, v and W of the paper, by query head.

    Args:
        heads: number of query heads.
        head_dim: dimensions of a head.
        size: dimensions of R.
        theta: base of R's wavelengths.
        like: gives device and dtype.
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
        """Initialise to ALiBi's preference for near tokens (its slopes, within ``reach`` tokens), encoded in v W."""
        heads, head_dim, size = self.weight.shape
        wanted = relative.recency(slopes(heads), scale, size, self.theta, reach) / (_LOUD * head_dim)
        with torch.no_grad():
            self.v.fill_(_LOUD)
            self.weight.copy_(wanted[:, None].expand(-1, head_dim, -1))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, v and W; a call, because Accelerate and DeepSpeed gather parameters for calls."""
        return self.u, self.v, self.weight

    def of(self, query: Tensor, scale: float, module: nn.Module | None = None) -> RelativeTerm:
        """Return the terms of these queries.

        Args:
            query: (batch, heads, q, d).
            scale: factor on the scores.
            module: the attention module, which tells which heads a tensor-parallel rank holds.

        Raises:
            AttnPatchError: heads are missing, or training under tensor parallelism would give each rank other
                parameters.
        """
        u, v, weight = self()
        mine = share(module, query.shape[1], u.shape[0])
        if query.shape[1] != u.shape[0] and torch.is_grad_enabled() and u.requires_grad:
            raise AttnPatchError(
                f"{CHILD}: under tensor parallelism each rank would train the terms of its own heads only, and they "
                f"would "
                "diverge; train with FSDP or DeepSpeed, or freeze them (requires_grad_(False))."
            )
        return RelativeTerm(u[mine], v[mine], weight[mine], self.theta, query, scale)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sight: Sight,
        scale: float,
        dropout: float,
        module: nn.Module | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend by torch's kernels; arguments as for :func:`hf_attnpatch.functional.biased.attend`."""
        return _attend(query, key, value, self, sight, scale, dropout, module, sinks)


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
    sinks: Tensor | None,
) -> Tensor:
    term = terms.of(query, scale, module)
    return attend_extended(term.content, key, value, term, sight, scale, dropout, sinks)


@dataclass(frozen=True)
class RelativeTerm:
    """The terms for some queries; implements :class:`hf_attnpatch.functional.biased.Extension`.

    Attributes:
        u: of the paper, (heads, d).
        v: of the paper, (heads, d).
        weight: W, (heads, d, size).
        theta: base of R's wavelengths.
        query: (batch, heads, q, d), as the module passes them to its attention function.
        scale: factor on the scores.
    """

    u: Tensor
    v: Tensor
    weight: Tensor
    theta: float
    query: Tensor
    scale: float

    @property
    def content(self) -> Tensor:
        """The queries plus u, whose product with the keys is the content part of the scores."""
        return self.query + self.u[:, None].to(self.query.dtype)

    def columns(self, here: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """Return the extra dimensions of queries at these positions and of the keys, a multiple of 8."""
        like = self.query
        left = relative.query_columns(like, *self._given(), here, self.theta).to(like.dtype)
        right = relative.key_columns(num_keys, self.weight.shape[2], self.theta, like.device).to(like.dtype)
        blank = -left.shape[-1] % 8
        return nn.functional.pad(left, (0, blank)), nn.functional.pad(right, (0, blank))

    def rows(self, here: Tensor, num_keys: int) -> Tensor:
        """Return the position term as a matrix, scaled."""
        return self.scale * relative.bias_rows(self.query, *self._given(), here, num_keys, self.theta)

    def _given(self) -> tuple[Tensor, Tensor]:
        return self.v.to(self.query.dtype), self.weight.to(self.query.dtype)


class Relative(Term):
    """Adds Transformer-XL's terms around attention; the trained parameters are in a child of the module."""

    name, what = CHILD, "Transformer-XL's position terms"

    def __repr__(self) -> str:
        return "u, v, W"

    def attend(self, call: AttentionCall, sight: Sight) -> Tensor:
        """Attend by torch's kernels, with extra dimensions, or rows of a matrix for few queries."""
        states = (call.query, call.key, call.value)
        sinks = call.given.get(words.SINKS)
        return _terms(call).attend(*states, sight, call.scale, call.dropout, call.module, sinks)

    def dense(self, call: AttentionCall, sight: Sight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return states with extra dimensions in fp32."""
        exact = torch.promote_types(call.query.dtype, torch.float32)
        here = positions(call.query, call.key, sight)
        query, key, _ = _extended(call.but(call.query.to(exact), call.key.to(exact)), here)
        return query, key, None

    def flex(self, call: AttentionCall) -> Output:
        """Further dimensions."""
        call.refuse(self.what, words.SINKS, words.SCORE_BIAS, words.CACHE, words.DROPOUT)
        refuse_tensor_mask(call)
        offset = getattr(call.mask, "query_offset", call.key.shape[2] - call.query.shape[2])
        here = torch.arange(call.query.shape[2], device=call.query.device)[None] + offset
        given = {**call.given, words.SCALING: call.scale}
        out, weights = plain_flex(call.but(*_extended(call, here), given=given))
        return out[..., : call.value.shape[-1]].contiguous(), weights

    def flash(self, call: AttentionCall, packed: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Further dimensions."""
        call.refuse(self.what, words.SINKS, words.SCORE_BIAS, words.CACHE)
        here = torch.arange(call.key.shape[2] - call.query.shape[2], call.key.shape[2], device=call.query.device)
        return _extended(call, here[None])


def _terms(call: AttentionCall) -> RelativeTerms:
    found = relative_of(call.module)
    assert found is not None
    return found


def _extended(call: AttentionCall, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prepend the extra dimensions to queries and keys, and append zeros to values."""
    term = _terms(call).of(call.query, call.scale, call.module)
    left, right = term.columns(here, call.key.shape[2])
    query, key = (
        torch.cat([more.expand(*states.shape[:3], -1), states], -1)
        for more, states in ((left, term.content), (right, call.key))
    )
    return query, key, nn.functional.pad(call.value, (0, query.shape[-1] - call.value.shape[-1]))


def relative_of(module: nn.Module) -> RelativeTerms | None:
    """Return the terms that this package gave an attention module, or None.

    If PEFT trains a copy of them (``modules_to_save``), that copy, as long as its adapter is active.

    Raises:
        AttnPatchError: the child is something else.
    """
    if wrapper_of(module, Relative) is None:
        return None
    found: Any = module._modules.get(CHILD)
    if hasattr(found, "original_module"):
        active = [] if found.disable_adapters else [n for n in found.active_adapters if n in found.modules_to_save]
        found = found.modules_to_save[active[0]] if active else found.original_module
    if isinstance(found, RelativeTerms):
        return found
    raise AttnPatchError(
        f"{type(module).__name__}: its {CHILD} is a {type(found).__name__}, which attention cannot read."
    )


def default_size(head_dim: int) -> int:
    """Return the dimensions of R: those of the head, made even, so that the kernel's heads at most double in width."""
    return 2 * math.ceil(head_dim / 2)
