"""Transformer-XL's relative attention (1901.02860, section 3.3) without its matrix of distances.

The scores are (q + u) k + (q + v) W R(i - j), with R(d) the sines and cosines of d at falling frequencies. By the
addition theorems sin((i - j) w) and cos((i - j) w) are sums of products of what the query's place gives and what the
key's place gives. The position term is so an inner product of further dimensions, (q + v) W turned by i on the query's
side and plain cosines and sines of j on the key's, and any attention kernel computes the whole, in linear memory. The
paper shifts a matrix of queries times distances instead, which takes quadratic memory.

Angles are made in fp64 and rounded last, so that a place may be any number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(size: int, theta: float) -> Tensor:
    """Radians per token, (size / 2,), fp64: theta^(-2f / size)."""
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def encoding(distances: Tensor, size: int, theta: float) -> Tensor:
    """R of the paper: all sines, then all cosines, as the authors' code has them.

    Args:
        distances: tokens from the query back to the key, (...), negative where the key comes later.
        size: dimensions of R, even.
        theta: base of the wavelengths.

    Returns:
        (..., size), fp64.
    """
    angles = distances.double()[..., None] * frequencies(size, theta).to(distances.device)
    return torch.cat([angles.sin(), angles.cos()], -1)


def query_columns(query: Tensor, v: Tensor, weight: Tensor, places: Tensor, theta: float) -> Tensor:
    """What stands on the query's side of the position term.

    Args:
        query: (batch, heads, q, d).
        v: global bias of the position term, (heads, d).
        weight: W, from R to a head's keys, (heads, d, size).
        places: of the queries, (batch or 1, q).
        theta: base of the wavelengths.

    Returns:
        (batch, heads, q, size), fp32 or wider: to be multiplied by :func:`key_columns`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    on_sines, on_cosines = ((query + v[:, None]) @ weight).to(exact).chunk(2, -1)
    sines, cosines = encoding(places, weight.shape[-1], theta)[:, None].to(exact).chunk(2, -1)
    return torch.cat([on_sines * sines + on_cosines * cosines, on_cosines * sines - on_sines * cosines], -1)


def key_columns(num_keys: int, size: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the key's side, (1, 1, num_keys, size), fp64: cosines of its position, then sines."""
    sines, cosines = encoding(torch.arange(num_keys, device=device), size, theta).chunk(2, -1)
    return torch.cat([cosines, sines], -1)[None, None]


def bias_rows(query: Tensor, v: Tensor, weight: Tensor, places: Tensor, num_keys: int, theta: float) -> Tensor:
    """Return the position term as a matrix, (batch, heads, q, num_keys), fp32 or wider; before scaling.

    The arguments are those of :func:`query_columns`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    left = query_columns(query, v, weight, places, theta)
    return left @ key_columns(num_keys, weight.shape[-1], theta, query.device).to(exact).transpose(-1, -2)


def recency(slope: Tensor, scale: float, size: int, theta: float, reach: int, deepest: float = 12.0) -> Tensor:
    """Return the weights of R, for each head, whose sum is closest to ALiBi's bias: -slope times distance.

    Least squares over all distances below ``reach``, weighted by 1 / (1 + distance), up to a constant, which softmax
    ignores; a bias below ``-deepest`` is clipped there, since its key gets no attention either way. A small ridge keeps
    the weights representable in narrow dtypes.

    Args:
        slope: (heads,), fp64.
        scale: factor on the scores.
        size: dimensions of R.
        theta: base of the wavelengths.
        reach: in tokens.
        deepest: the smallest bias that matters, in nats.

    Returns:
        (heads, size), fp64.
    """
    distances = torch.arange(reach, dtype=torch.float64)
    wanted = -(slope[:, None] * distances).clamp(max=deepest) / scale
    share = 1 / (1 + distances)
    share = share / share.sum()
    known = encoding(distances, size, theta)
    known, wanted = known - share @ known, wanted - (wanted @ share)[:, None]
    gram = (known * share[:, None]).T @ known + 1e-4 * torch.eye(size, dtype=torch.float64)
    found: Tensor = torch.linalg.solve(gram, (known * share[:, None]).T @ wanted.T)
    return found.T
