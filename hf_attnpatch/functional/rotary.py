"""Rotary frequencies as plain functions of a vector of inverse frequencies.

Independent of transformers, so that it can serve as its reference, and defined on *any* frequencies, so that one
scaling can be applied on top of another. Frequencies are in radians per position, fp32, shape (rotary_dim / 2,).
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


def ntk(inv_freq: Tensor, factor: float) -> Tensor:
    """NTK-aware: the base times s^(d/(d-2)), which divides the lowest frequency by s and keeps the highest.

    Args:
        inv_freq: at least two frequencies of one base, or such frequencies scaled.
        factor: s, at least 1.
    """
    steps = torch.arange(len(inv_freq), dtype=torch.float64) / (len(inv_freq) - 1)
    return (inv_freq.double() * factor**-steps).to(inv_freq.dtype)


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """The base that :func:`ntk` amounts to on unscaled frequencies, b s^(d/(d-2))."""
    return float(theta * factor ** (rotary_dim / (rotary_dim - 2)))


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


def yarn(
    theta: float,
    rotary_dim: int,
    factor: float,
    trained: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN's frequencies as its code and transformers compute them: a ramp over the *index* of a frequency.

    :func:`by_parts` is the paper's formula, a ramp over turns; they agree where a frequency is kept or divided whole.

    Args:
        theta: base of the unscaled frequencies.
        rotary_dim: twice the number of frequencies.
        factor: target length over trained length, at least 1.
        trained: window in tokens.
        beta_fast: turns within the window where the ramp begins.
        beta_slow: turns where it ends.
        truncate: whether it begins and ends at whole indices.
    """

    def index(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if high == low else 0
    divided = ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return default(theta, rotary_dim) * (divided / factor + (1 - divided))


def resonance(inv_freq: Tensor, trained: int) -> Tensor:
    """Wavelengths below the trained window rounded to whole tokens, so that they repeat exactly (2403.00071, 4.1)."""
    wavelengths = 2 * math.pi / inv_freq.double()
    rounded = torch.where(wavelengths < trained, wavelengths.round(), wavelengths)
    return (2 * math.pi / rounded).to(inv_freq.dtype)


def clipped(inv_freq: Tensor, count: int) -> Tensor:
    """The ``count`` lowest frequencies tapered by half a cosine, the lowest to zero (CoPE, 2602.05258)."""
    taper = 0.5 * (1 + torch.linspace(0, math.pi, count, dtype=torch.float64).cos())
    kept = torch.ones(len(inv_freq) - count, dtype=torch.float64)
    return (inv_freq.double() * torch.cat([kept, taper])).to(inv_freq.dtype)


def llama3(inv_freq: Tensor, factor: float, trained: int, low: float = 1.0, high: float = 4.0) -> Tensor:
    """Llama 3.1: wavelengths below trained/high kept, above trained/low divided, smooth in between."""
    turns = trained * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / factor)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on cos and sin, 0.1 ln s + 1 (2309.00071, equation 22); ``mscale`` multiplies the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_attention(factor: float, trained: int) -> float:
    """LongRoPE's factor on cos and sin, sqrt(1 + ln s / ln L) (2402.13753, as Phi-3 publishes it)."""
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
