"""Flash attention inside a forward that computes its scores by itself, without touching that forward.

The module's cache hands it keys and values that are not computed with but take notes: which queries they are
multiplied by, what is added, scaled, masked and dropped. When the attention weights are multiplied by the values, the
whole is known, and a fused kernel computes it. Shapes are those of tensors on the meta device, so that torch itself
checks every step; an operation that is not listed here raises, and then the patch is refused, never silently wrong.
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
from .masks import Handed
from .noted import Noted
from .own_bias import OwnBias
from .rotation import Turn
from .wrapper import Term


@dataclass(frozen=True)
class Keys(Noted):
    """Keys on their way to the queries.

    Attributes:
        data: (batch, kv heads, k, d).
        shadow: of what the forward believes to hold.
        module: whose they are.
        sight: what queries see, as far as the mask was taken from the forward; None where the forward adds it itself.
        term: added to the scores in the place of the forward's own bias; None keeps that.
        turn: the rotation of the queries; these keys have been rotated.
        handed: by a memory in the place of a mask, or None.
    """

    data: Tensor
    shadow: Tensor
    module: nn.Module
    sight: Sight | None
    term: Term | None = None
    turn: Turn | None = None
    handed: Handed | None = None

    @property
    def _held(self) -> Tensor:
        return self.data

    def _on_matmul(self, left: Any, right: Any) -> Scores:
        if isinstance(left, Noted) or self.shadow.shape[-2] != self.data.shape[-1]:
            raise NotImplementedError("keys that are not multiplied by queries, transposed")
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
class Values(Noted):
    """Values, waiting for the attention weights: (batch, kv heads, k, d_v)."""

    data: Tensor
    shadow: Tensor

    @property
    def _held(self) -> Tensor:
        return self.data


@dataclass(frozen=True)
class Scores(Noted):
    """Scores that were never computed.

    Attributes:
        query: (batch, heads, q, d) or (batch * heads, q, d).
        keys: theirs.
        shadow: (batch, heads, q, k) or (batch * heads, q, k).
        scale: on the inner products.
        bias: by head and key, (batch or 1, heads or 1, 1, k).
        mask: by query too, (batch or 1, heads or 1, q, k), added; or bool, True where a key is seen.
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
            raise NotImplementedError("scores chosen among others")
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
        """Hide some scores, with a value that means no attention."""
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
        """Give a tensor that broadcasts to the scores the dimensions of (batch, heads, q, k)."""
        if self.shadow.dim() == 4 or added.dim() < 3:
            return added[(None,) * (4 - added.dim())]
        batch = self.keys.data.shape[0]
        return added.view(batch if added.shape[0] > 1 else 1, -1, *added.shape[1:])


@dataclass(frozen=True)
class Weights(Noted):
    """Attention weights that will never be computed."""

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
            raise NotImplementedError("attention weights multiplied by something else than the values")
        out = attended(self, right)
        return out.reshape((self.shadow @ right.shadow.to(self.dtype)).shape)

    _on_bmm = _on_matmul

    def __matmul__(self, right: Any) -> Tensor:
        return self._on_matmul(self, right)


def attended(weights: Weights, values: Values) -> Tensor:
    """Compute what was noted, (batch, heads, q, d_v): the same call that a module would make which dispatches."""
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
    """Return what the queries see, and what is added to their scores; of a memory, what they see is not known yet."""
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


def _handed(scores: Scores, handed: Handed, sight: Sight | None) -> Handed:
    """Return what the wrapper of a memory reads in the place of a mask.

    Raises:
        AttnPatchError: the module hides more than what comes later.
    """
    mask = scores.mask
    if not handed.call.plain and mask is not None:
        causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril(mask.shape[-1] - mask.shape[-2])
        if not bool(((hiding(mask) > UNSEEN) == causal).all()):
            raise AttnPatchError(
                "the module hides more from its queries than what comes after them (a window, say), of which a memory "
                "knows nothing."
            )
    return Handed(handed.call, sight)


def _sight(scores: Scores, query: Tensor) -> Sight:
    """Join the mask that was taken from the forward with the one that it added."""
    sight, mask = scores.keys.sight, scores.mask
    if mask is None:
        if sight is None and query.shape[2] > 1:
            raise NotImplementedError("scores without a mask")
        return sight or Sight(True)
    mask = mask if sight is None else _joined(mask, sight, query.shape[2])
    mask = mask.clamp(min=HIDDEN).to(torch.promote_types(query.dtype, torch.float32))
    return Sight(True, None if sight is None else sight.keep, mask)


def _joined(added: Tensor, sight: Sight, queries: int) -> Tensor:
    """What the forward added, and what was taken from it; one that hides nothing is no mask, but a bias."""
    seen = sight.mask
    if seen is None and (queries == 1 or not sight.causal or bool((added < UNSEEN).any())):
        return added
    seen = added.new_ones(queries, added.shape[-1], dtype=torch.bool).tril() if seen is None else seen
    return added.masked_fill(~seen, HIDDEN) if seen.dtype == torch.bool else added + seen
