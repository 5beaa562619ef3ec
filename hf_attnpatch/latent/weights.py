"""The weights of one latent attention module, in float64 and in coordinates that no norm has touched yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional.gauge import Frame
from ..functional.latent import Split
from ..heads.weights import HeadWeights, projected


@dataclass(frozen=True)
class LatentWeights:
    """Projections of latent attention, a bias as the last input column.

    Attributes:
        query: (num_heads, nope + rope, in_features + 1): what meets unrotated keys, then what meets the rotary key,
            real parts of all its components before imaginary ones.
        latent: (rank - 1, in_features + 1).
        key: (rope, in_features + 1), the rotary key that all heads share.
        up: (num_heads, nope + v_head_dim, rank), keys and values of the latent; the last column is added as it is.
        output: (out_features, num_heads, v_head_dim).
        output_bias: (out_features,), or None.
    """

    trained: ClassVar[tuple[str, ...]] = ("query", "latent", "key", "up", "output")

    query: Tensor
    latent: Tensor
    key: Tensor
    up: Tensor
    output: Tensor
    output_bias: Tensor | None

    def project(self, heads: Tensor) -> Tensor:
        """Return the attention output, (tokens, out_features), of what the heads give, (tokens, num_heads, dim)."""
        return projected(self.output, self.output_bias, heads)


def lossless(weights: HeadWeights, keys: Frame) -> LatentWeights:
    """Keep every plane of every head in the rotary key, plane by plane, and all values in the latent.

    Args:
        weights: of the original.
        keys: which dimensions RoPE rotates: all.
    """
    order = torch.cat([keys.planes[:, 0], keys.planes[:, 1]])  # real parts, imaginary parts
    heads, dim, wide = weights.key.shape
    half, members, size = dim // 2, len(weights.query) // heads, weights.value.shape[1]
    query = weights.query.new_zeros(len(weights.query), 2, half, heads, wide)
    up = weights.value.new_zeros(len(weights.query), size, heads * size + 1)
    for head, owner in enumerate(torch.arange(heads).repeat_interleave(members).tolist()):
        query[head, :, :, owner] = weights.query[head, order].view(2, half, wide)
        up[head, :, owner * size : (owner + 1) * size] = torch.eye(size, dtype=up.dtype)
    key = weights.key[:, order].view(heads, 2, half, wide).permute(1, 2, 0, 3).reshape(heads * dim, wide)
    value = weights.value.flatten(0, 1)
    return LatentWeights(query.flatten(1, 3), value, key, up, weights.output, weights.output_bias)


def compressed(weights: HeadWeights, maps: Split, mean: Tensor, bias: Tensor | None) -> LatentWeights:
    """Apply the maps of a split to the projections of the original.

    Args:
        weights: of the original.
        maps: its split.
        mean: of keys and values side by side, that the latent leaves out.
        bias: of the output projection in the home; None where it has none.
    """
    states = torch.cat([weights.key.flatten(0, 1), weights.value.flatten(0, 1)])
    latent = maps.latent @ states
    latent[:, -1] -= maps.latent @ mean
    nope = torch.einsum("hab,hbx->hax", maps.query, weights.query)
    rope = torch.einsum("hab,hbx->hax", maps.key_reader, weights.query)
    constant = torch.cat([maps.value.new_zeros(maps.up_key.shape[:2]), maps.value], dim=1)
    up = torch.cat([torch.cat([maps.up_key, maps.up_value], dim=1), constant[..., None]], dim=2)
    query = torch.cat([nope, rope], dim=1)
    key = maps.key @ states[: maps.key.shape[1]]
    return LatentWeights(query, latent, key, up, weights.output, bias)
