"""Rotary frequencies as plain functions of a vector of inverse frequencies.

Independent of transformers, so that it can serve as its oracle, and acting on *any* frequencies, so that a scaling
can be put on top of one that is already there. Frequencies are in radians per position, fp32, shape (rotary_dim / 2,).
"""

import math

import torch
from torch import Tensor


def default(theta: float, rotary_dim: int) -> Tensor:
    """theta_i = base^(-2i/d) (RoFormer, 2104.09864, section 3.2.2)."""
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def linear(inv_freq: Tensor, factor: float) -> Tensor:
    """Position interpolation: every angle divided by ``factor`` (2306.15595)."""
    return inv_freq / factor


def by_parts(inv_freq: Tensor, factor: float, trained: int, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Tensor:
    """NTK-by-parts: keep what turns often within the trained window, interpolate what does not (2309.00071, 3.2).

    Args:
        inv_freq: frequencies to scale.
        factor: target length over trained length, at least 1.
        trained: window in tokens that ``inv_freq`` was trained on.
        beta_fast: at least this many turns within the window: kept.
        beta_slow: at most this many turns: divided by ``factor``.
    """
    turns = trained * inv_freq / (2 * math.pi)
    keep = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / factor)


def llama3(inv_freq: Tensor, factor: float, trained: int, low: float = 1.0, high: float = 4.0) -> Tensor:
    """Llama 3.1: wavelengths below trained/high kept, above trained/low divided, smooth in between."""
    turns = trained * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / factor)


def yarn_attention(factor: float) -> float:
    """YaRN's factor on cos and sin, 0.1 ln s + 1 (2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, trained: int) -> float:
    """LongRoPE's factor on cos and sin, sqrt(1 + ln s / ln L) (2402.13753, as Phi-3 publishes it)."""
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
