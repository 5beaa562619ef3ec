"""How large a latent is, and what a stock config says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional.latent import stock_factors
from .weights import LatentWeights

HALF = {torch.float16: 2.0**9}  # the constant channel before the norm; half precision has no room for more
CONSTANT = 2.0**20
LEAST = 4  # numbers a token that the least latent takes: a plane of the rotary key, a channel and the constant


@dataclass(frozen=True)
class Shape:
    """Latent attention of all layers of a model.

    Attributes:
        num_heads: query heads.
        head_dim: of the original.
        v_head_dim: of values.
        rank: width of the latent, its constant channel included.
        counts: components of each plane that the rotary key holds.
        nope_dim: dimensions of a head that meet unrotated keys.
        width: of the hidden states.
        query_bias: whether queries have a bias, which takes a latent of their own.
    """

    num_heads: int
    head_dim: int
    v_head_dim: int
    rank: int
    counts: tuple[int, ...]
    nope_dim: int
    width: int
    query_bias: bool

    @property
    def rope_dim(self) -> int:
        """Width of the rotary key."""
        return 2 * sum(self.counts)

    @property
    def cached(self) -> int:
        """Numbers that a cache of the latent holds for each token and layer."""
        return self.rank + self.rope_dim

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, for the home divides scores by the root of another width."""
        return math.sqrt((self.nope_dim + self.rope_dim) / self.head_dim)

    def fields(self, frequencies: Tensor, theta: float, attention: float, context: int) -> dict[str, Any]:
        """Return the fields of a stock config.

        Args:
            frequencies: of each plane, float32.
            theta: base that the table is written against.
            attention: what cosine and sine are multiplied by.
            context: in tokens.
        """
        table = stock_factors(frequencies.repeat_interleave(torch.tensor(self.counts)), theta)
        rope = {
            **{"rope_type": "longrope", "rope_theta": theta, "factor": 1.0, "attention_factor": attention},
            **{"short_factor": table, "long_factor": table, "original_max_position_embeddings": context},
        }
        return {
            "num_key_value_heads": self.num_heads,
            "q_lora_rank": self.width + 1 if self.query_bias else None,
            "kv_lora_rank": self.rank,
            "qk_rope_head_dim": self.rope_dim,
            "qk_nope_head_dim": self.nope_dim,
            "v_head_dim": self.v_head_dim,
            "head_dim": self.rope_dim,
            "attention_bias": True,
            "rope_interleave": False,
            "rope_parameters": rope,
        }

    def tensors(self, weights: LatentWeights, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parameters of the stock module, differentiable in the weights.

        One channel of the latent is a constant so large that the root mean square of all is its own, which the norm's
        weight undoes: the norm does nothing. Both are powers of two.

        Args:
            weights: by projection.
            dtype: that the module computes in.
        """
        big = HALF.get(dtype, CONSTANT)
        query = weights.query * self.query_scale
        like = query.new_zeros(())
        norm, undo = _norm(big, self.rank)
        latent, key = weights.latent * undo, weights.key  # here its rounding differs from number to number
        down = torch.cat([latent, like.expand(1, latent.shape[1]), key])
        hot = torch.zeros(len(down), dtype=like.dtype, device=like.device)
        hot[self.rank - 1] = big
        scale = torch.ones(self.rank, dtype=like.dtype, device=like.device)
        scale[-1] = undo / big
        return {
            **self._queries(query, big),
            "kv_a_proj_with_mqa.weight": down[:, :-1],
            "kv_a_proj_with_mqa.bias": down[:, -1] + hot,
            "kv_a_layernorm.weight": like.new_full((self.rank,), norm),
            "kv_b_proj.weight": (weights.up * scale).flatten(0, 1),
            "o_proj.weight": weights.output.flatten(1),
            "o_proj.bias": like.expand(len(weights.output)) if weights.output_bias is None else weights.output_bias,
        }

    def _queries(self, query: Tensor, big: float) -> dict[str, Tensor]:
        flat = query.flatten(0, 1)
        if not self.query_bias:
            return {"q_proj.weight": flat[:, :-1]}
        norm, undo = _norm(big, self.width + 1)
        eye = torch.eye(self.width + 1, self.width, dtype=flat.dtype, device=flat.device)
        hot = flat.new_zeros(self.width + 1)
        hot[-1] = big
        scale = flat.new_full((self.width + 1,), undo)
        scale[-1] /= big
        return {
            "q_a_proj.weight": eye,
            "q_a_proj.bias": hot,
            "q_a_layernorm.weight": flat.new_full((self.width + 1,), norm),
            "q_b_proj.weight": flat * scale,
        }


def _norm(big: float, size: int) -> tuple[float, float]:
    """Return a norm's weight, a power of two, and what is left to multiply by after it."""
    exact = big / size**0.5
    norm = 2.0 ** round(torch.tensor(exact).log2().item())
    return norm, exact / norm
