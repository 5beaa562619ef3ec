"""Deferred attention: routes a forward that computes its own scores through a fused kernel, without changing its code.

The module's cache returns lazy keys and values. They record what the forward does with them: the queries they are
multiplied by, and every bias, scale, mask and dropout. When the attention weights meet the values, the whole call is
known and a fused kernel computes it. Shapes are those of meta tensors, so that torch checks each step. An operation
that is not listed here raises, and the patch is refused; results are never silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AttnPatchError
from ..functional.biased import UNSEEN, Sight, hiding
from ..functional.sinking import HIDDEN
from ..upstream import words
from .call import AttentionCall
from .kernels import attend
from .masks import MemoryMask
from .noted import LazyStates
from .own_bias import OwnBias
from .rotation import KeyRotation
from .wrapper import Term


@dataclass(frozen=True)
class Keys(LazyStates):
    """Lazy keys, which wait to be multiplied by the queries.

    Attributes:
        data: (batch, kv heads, k, d).
        shadow: a meta tensor with the shape and dtype that the forward sees.
        module: the attention module.
        sight: which keys the queries see, if the mask was taken from the forward; None if the forward adds its own.
        term: added to the scores instead of the forward's own bias; None keeps that bias.
        turn: how the queries are rotated; these keys are rotated already.
        handed: the mask that a segment memory passes instead of the usual one, or None.
    """

    data: Tensor
    shadow: Tensor
    module: nn.Module
    sight: Sight | None
    term: Term | None = None
    turn: KeyRotation | None = None
    handed: MemoryMask | None = None

    @property
    def _held(self) -> Tensor:
        return self.data

    def _on_matmul(self, left: Any, right: Any) -> Scores:
        if isinstance(left, LazyStates) or self.shadow.shape[-2] != self.data.shape[-1]:
            raise NotImplementedError("keys used for something other than queries times keys")
        return Scores(left, self, left.to("meta") @ self.shadow, 1.0, None, None)

    _on_bmm = _on_matmul

    def _on_baddbmm(
        self, added: Tensor, batch1: Tensor, batch2: Any, *, beta: float = 1.0, alpha: float = 1.0
    ) -> Scores:
        scores = self._on_matmul(batch1, batch2) * alpha
        return scores + added * beta if beta != 0 and bool(added.any()) else scores  # mostly zeros, to be written into

    def _on_scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Any,
        value: Any,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        sight = (self.sight or Sight(is_causal)) if attn_mask is None else self.sight
        scores = replace(self, sight=sight, shadow=self.shadow.transpose(-1, -2))._on_matmul(query, None)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale) + attn_mask
        return attended(Weights(scores, scores.shadow, dropout_p), value)


@dataclass(frozen=True)
class Values(LazyStates):
    """Lazy values, which wait for the attention weights: (batch, kv heads, k, d_v)."""

    data: Tensor
    shadow: Tensor

    @property
    def _held(self) -> Tensor:
        return self.data


@dataclass(frozen=True)
class Scores(LazyStates):
    """Lazy attention scores.

    Attributes:
        query: (batch, heads, q, d) or (batch * heads, q, d).
        keys: the lazy keys.
        shadow: (batch, heads, q, k) or (batch * heads, q, k).
        scale: factor on the inner products.
        bias: depends on head and key only, (batch or 1, heads or 1, 1, k).
        mask: depends on the query too, (batch or 1, heads or 1, q, k); added if float, True where a key is seen if
            bool.
    """

    knows_more: ClassVar[bool] = True

    query: Tensor
    keys: Keys
    shadow: Tensor
    scale: float
    bias: Tensor | None
    mask: Tensor | None

    @property
    def _held(self) -> Tensor:
        return self.query

    def _on_where(self, seen: Tensor, scores: Any, hidden: Any) -> Scores:
        if scores is not self or not isinstance(hidden, Tensor) or hidden.numel() != 1:
            raise NotImplementedError("torch.where between scores")
        found: Scores = self.masked_fill(~seen, float(hidden))
        return found

    def __mul__(self, factor: float) -> Scores:
        if isinstance(factor, Tensor) or factor <= 0:
            raise NotImplementedError(f"scores scaled by {factor}")
        bias, mask = (None if t is None else t * factor for t in (self.bias, self.mask))
        return replace(self, scale=self.scale * factor, bias=bias, mask=mask)

    def __truediv__(self, divisor: float) -> Scores:
        return self * (1 / divisor)

    def __add__(self, added: Tensor | None) -> Scores:
        if added is None:
            return self
        shadow = self.shadow + added.to("meta")
        wide = hiding(self._wide(added))
        if wide.shape[-2] > 1 or (self.keys.sight is None and wide.dtype == torch.bool):
            return replace(self, mask=wide if self.mask is None else self.mask + wide, shadow=shadow)
        return replace(self, bias=wide if self.bias is None else self.bias + wide, shadow=shadow)

    __rmul__, __imul__, __itruediv__, __iadd__, __radd__ = __mul__, __mul__, __truediv__, __add__, __add__

    def masked_fill(self, hidden: Tensor, value: float) -> Scores:
        """Mask some scores with a value that means no attention."""
        if value > -1e4:
            raise NotImplementedError(f"scores filled with {value}")
        wide = self._wide(torch.zeros(()).to(hidden.device).masked_fill(hidden, HIDDEN))
        return replace(self, mask=wide if self.mask is None else self.mask + wide)

    def _on_add(self, left: Any, right: Any) -> Scores:
        found: Scores = self + (right if left is self else left)
        return found

    def _on_mul(self, left: Any, right: Any) -> Scores:
        found: Scores = self * (right if left is self else left)
        return found

    _on_radd, _on_rmul = _on_add, _on_mul

    def _on_softmax(self, scores: Any, dim: int = -1, dtype: torch.dtype | None = None, **_: Any) -> Weights:
        if dim not in (-1, self.shadow.dim() - 1):
            raise NotImplementedError(f"softmax over dimension {dim}")
        return Weights(self, self.shadow if dtype is None else self.shadow.to(dtype), 0.0)

    def _wide(self, added: Tensor) -> Tensor:
        """Expand a tensor that broadcasts to the scores to four dimensions, (batch, heads, q, k)."""
        if self.shadow.dim() == 4 or added.dim() < 3:
            return added[(None,) * (4 - added.dim())]
        batch = self.keys.data.shape[0]
        return added.view(batch if added.shape[0] > 1 else 1, -1, *added.shape[1:])


@dataclass(frozen=True)
class Weights(LazyStates):
    """Lazy attention weights."""

    knows_more: ClassVar[bool] = True

    scores: Scores
    shadow: Tensor
    dropped: float

    @property
    def _held(self) -> Tensor:
        return self.scores.query

    def _on_dropout(self, weights: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Weights:
        return replace(self, dropped=p) if training and p > 0 else self

    def _on_matmul(self, left: Any, right: Any) -> Tensor:
        if left is not self or not isinstance(right, Values):
            raise NotImplementedError("attention weights multiplied by something other than the values")
        out = attended(self, right)
        return out.reshape((self.shadow @ right.shadow.to(self.dtype)).shape)

    _on_bmm = _on_matmul

    def __matmul__(self, right: Any) -> Tensor:
        return self._on_matmul(self, right)


def attended(weights: Weights, values: Values) -> Tensor:
    """Compute the recorded attention, (batch, heads, q, d_v), by the call that a dispatching module would make."""
    scores, keys, value = weights.scores, weights.scores.keys, values.data
    query = scores.query.reshape(keys.data.shape[0], -1, *scores.query.shape[-2:]).to(value.dtype)
    sight, term = _told(scores, query)
    mask = sight if keys.handed is None else _handed(scores, keys.handed, sight)
    if keys.turn is not None:
        keys.turn.begins(keys.module)
    given = {words.SCALING: scores.scale, words.DROPOUT: weights.dropped, words.IS_CAUSAL: True}
    call = AttentionCall("sdpa", keys.module, query, keys.data.to(value.dtype), value, mask, given, term)
    out, _ = attend(call)
    return out.transpose(1, 2)


def _told(scores: Scores, query: Tensor) -> tuple[Sight | None, Term]:
    """Return which keys the queries see (None if a segment memory decides) and the term added to the scores."""
    keys = scores.keys
    if keys.handed is not None and not keys.handed.call.plain:
        assert keys.term is not None
        return None, keys.term
    sight, bias = _sight(scores, query), scores.bias
    if bias is not None:  # a mask may have come with it: Falcon writes both into one tensor
        hidden = bias < UNSEEN
        bias = bias.masked_fill(hidden, 0.0).expand(-1, query.shape[1], -1, -1)[:, :, 0]
        keep = ~hidden[:, 0, 0].expand(keys.data.shape[0], -1)
        sight = replace(sight, keep=keep if sight.keep is None else keep & sight.keep)
    if keys.term is None:
        return sight, OwnBias(bias)
    if sight.mask is not None and sight.mask.dtype != torch.bool:  # the forward's bias may be in it
        seen = sight.mask > UNSEEN
        sight = replace(sight, mask=seen if sight.keep is None else seen & sight.keep[:, None, None])
    return sight, keys.term


def _handed(scores: Scores, handed: MemoryMask, sight: Sight | None) -> MemoryMask:
    """Return the mask that the segment memory reads.

    Raises:
        AttnPatchError: the module masks more than the future (a window, say).
    """
    mask = scores.mask
    if not handed.call.plain and mask is not None:
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(mask.shape[-1] - mask.shape[-2])
        if not bool(((hiding(mask) > UNSEEN) == causal).all()):
            raise AttnPatchError(
                "the module masks more than future tokens (a window, say), of which a memory knows nothing."
            )
    return MemoryMask(handed.call, sight)


def _sight(scores: Scores, query: Tensor) -> Sight:
    """Combine the mask that was taken from the forward with the one that the forward added."""
    sight, mask = scores.keys.sight, scores.mask
    if mask is None:
        if sight is None and query.shape[2] > 1:
            raise NotImplementedError("scores without an attention mask")
        return sight or Sight(True)
    mask = mask if sight is None else _joined(mask, sight, query.shape[2])
    mask = mask.clamp(min=HIDDEN).to(torch.promote_types(query.dtype, torch.float32))
    return Sight(True, None if sight is None else sight.keep, mask)


def _joined(added: Tensor, sight: Sight, queries: int) -> Tensor:
    """Combine what the forward added with the mask taken from it; a tensor that masks nothing is a bias."""
    seen = sight.mask
    if seen is None and (queries == 1 or not sight.causal or bool((added < UNSEEN).any())):
        return added
    seen = added.new_ones(queries, added.shape[-1], dtype=torch.bool).tril() if seen is None else seen
    return added.masked_fill(~seen, HIDDEN) if seen.dtype == torch.bool else added + seen
