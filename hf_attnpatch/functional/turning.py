"""Rotation of states by angles, and the additive sinusoid, as functions of positions.

Angles are computed in fp32 or wider whatever the states' dtype, and rounded last: in bf16 scores would no longer depend
on the distance alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def angles(frequencies: Tensor, places: Tensor, attention: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position times frequency, each (batch or 1, 1, length, rotary_dim / 2), fp32.

    Args:
        frequencies: radians per position, (rotary_dim / 2,).
        places: positions in tokens, (batch or 1, length), integers.
        attention: factor on both (YaRN's).
    """
    turns = places[:, None, :, None] * frequencies.to(places.device, torch.float32)
    return attention * turns.cos(), attention * turns.sin()


def turned(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first dimensions of each head (RoFormer, 2104.09864, equation 34); the others pass.

    Args:
        states: queries or keys, (batch, heads, length, head_dim).
        cos: (batch or 1, 1, length, rotary_dim / 2), fp32.
        sin: the same.
        interleaved: whether dimensions 2i and 2i + 1 form a pair, as in the paper and GPT-J; otherwise i and
            i + rotary_dim / 2 do, as in GPT-NeoX and Llama.
    """
    width = 2 * cos.shape[-1]
    part = states[..., :width]
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    whole = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([whole.to(states.dtype), states[..., width:]], -1)


def sinusoid(places: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """PE(p, 2i) = sin(p theta^(-2i/d)), PE(p, 2i+1) = cos(same): Attention Is All You Need, 1706.03762, section 3.5.

    Sines and cosines alternate, as in the paper; the tables of the fairseq family (XGLM, Marian) have all sines first.

    Args:
        places: positions in tokens, any shape, integers.
        width: of the model, d.
        theta: base of the wavelengths.

    Returns:
        (*places.shape, width), fp32; computed in fp64 where the device has it.
    """
    wide = torch.float32 if places.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, device=places.device, dtype=wide) / width
    turns = places[..., None] * theta**-exponents
    return torch.stack([turns.sin(), turns.cos()], -1).flatten(-2)[..., :width].to(torch.float32)
