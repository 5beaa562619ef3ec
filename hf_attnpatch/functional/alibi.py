"""ALiBi without a bias matrix: a few extra dimensions of queries and keys give the bias in any attention kernel.

Softmax ignores a constant for each query, so that the bias -m (i - j) may be written m j - c with any c, and m j is an
inner product. What makes this exact in a narrow dtype (2108.12409 has the bias, not this):

* positions are split into digits that the dtype holds exactly (bfloat16 holds integers to 256), slopes into parts of
  eight bits, so that every product and every sum of one part is exact in the kernel's fp32 accumulator;
* c is near m i, so that what is left for keys near the query is small and loses nothing to rounding;
* these dimensions come first, so that the large terms cancel before the ordinary products are added.

Everything is computed in fp64 and rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = 8  # significant bits of a part of a slope: times a position to 65 536, a product of 24 bits
_SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
_DIGIT = 256  # base of position digits, if the dtype cannot hold positions exactly
_HIDE_QUERY, _HIDE_KEY = 2.0**12, -(2.0**15)  # their product, times the scale, hides a key; both fit into fp16


def slopes(num_heads: int) -> Tensor:
    """The paper's slopes, (num_heads,), fp64: 2^(-8h/n), h = 1..n, for n a power of two (2108.12409, section 3).

    For another n, those of the next lower power of two, then every other one of the doubled list, as the authors'
    code, BLOOM and MPT have it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    more = [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(first + more, dtype=torch.float64)


def bias(slope: Tensor, queries: Tensor, keys: Tensor, clip: int | None = None) -> Tensor:
    """Return the bias as a matrix, -slope |i - j|; the reference for the extra dimensions.

    Args:
        slope: (heads,).
        queries: positions, (..., q).
        keys: positions, (k,).
        clip: larger distances count as this one.

    Returns:
        (..., heads, q, k), in the dtype of ``slope``.
    """
    distance = (queries[..., :, None] - keys).abs()
    distance = distance if clip is None else distance.clamp(max=clip)
    return -slope[:, None, None] * distance[..., None, :, :]


def parts(values: Tensor, count: int, bits: int) -> list[Tensor]:
    """Split fp64 values into a sum of ``count`` parts, each of at most ``bits`` significant bits, largest first."""
    found, rest, factor = [], values, 2.0 ** (_SIGNIFICAND[torch.float64] - bits) + 1
    for _ in range(count):
        large = rest * factor  # Veltkamp's splitting: products and differences only, which ONNX has, too
        part = large - (large - rest)
        found.append(part)
        rest = rest - part
    return found


def digits(positions: Tensor, length: int, dtype: torch.dtype) -> list[tuple[Tensor, float]]:
    """Split positions below ``length`` into digits that the dtype holds exactly, each with its place value."""
    if length <= 2 ** _SIGNIFICAND[dtype]:
        return [(positions.double(), 1.0)]
    found, weight, rest = [], 1.0, positions
    while length > 1:
        found.append(((rest % _DIGIT).double(), weight))
        rest, length, weight = rest // _DIGIT, -(-length // _DIGIT), weight * _DIGIT
    return found[::-1]


def columns(
    slope: Tensor, scale: float, queries: Tensor, num_keys: int, dtype: torch.dtype, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the extra dimensions of queries and keys; their inner product times ``scale`` is the bias.

    The bias is exact up to a constant per query. Slopes are on the query's side, so that grouped heads share a key.

    Args:
        slope: (heads,), of the query heads; fp64.
        scale: factor of the kernel on inner products.
        queries: (batch or 1, q), index of the key at the same position; a wrong one costs precision, not correctness.
        num_keys: how many keys there are; key j is at position j.
        dtype: of the queries and keys.
        keep: (batch, k), bool: False hides a key that is padding; None if there is no padding.

    Returns:
        (batch or 1, heads, q, c) and (batch or 1, 1, k, c), c a multiple of 8.
    """
    keys = torch.arange(num_keys, device=queries.device)[None, None]
    left, right = _pairs(slope, scale, queries, keys, num_keys, dtype)
    left, right = _hidden(left, right, keep, left[0])
    return _stacked(left, dtype), _stacked(right, dtype)


def offset(slope: Tensor, scale: float, queries: Tensor, num_keys: int, dtype: torch.dtype) -> Tensor:
    """Return the value that the rounded columns give for the key at the query's own position instead of 0, fp64.

    Shape (batch, heads, q). It is the same for all keys of a query: softmax ignores it, a log-sum-exp does not.
    """
    pairs = zip(*_pairs(slope, scale, queries, queries[:, None], num_keys, dtype), strict=True)
    return scale * sum((a.to(dtype).double() * b.to(dtype).double() for a, b in pairs), torch.zeros(()).double())


def _pairs(
    slope: Tensor, scale: float, queries: Tensor, keys: Tensor, length: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """The columns of queries at ``queries``, (batch, q), and keys at ``keys``, (batch, 1, k), one by one, unrounded."""
    steep, here = (slope / scale)[:, None], queries[:, None].double()
    left: list[Tensor] = []
    right: list[Tensor] = []
    exact = _SIGNIFICAND[dtype] > 24
    for part in [steep] if exact else parts(steep, 3 if dtype == torch.float32 else 2, BITS):
        for digit, weight in digits(keys, length, dtype):
            left.append((part * weight).expand(queries.shape[0], -1, queries.shape[1]))
            right.append(digit)
        left.append(-part * here / _DIGIT)
        right.append(torch.full_like(keys, _DIGIT, dtype=torch.float64))
    return left, right


def bias_columns(
    biases: Tensor, scale: float, queries: Tensor, dtype: torch.dtype, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return columns for any bias that depends on head and key only, such as a rounded slope times position.

    Args:
        biases: (batch or 1, heads, k).
        scale: factor of the kernel on inner products.
        queries: (batch or 1, q), index of a visible key whose bias is among the query's largest.
        dtype: of the queries and keys.
        keep: as in :func:`columns`.

    Returns:
        (batch or 1, heads, q, c) and (batch or 1, heads, k, c), c a multiple of 8.
    """
    wanted = biases.double() / (scale * _DIGIT)
    heads = biases.shape[1]
    index = queries[:, None].expand(-1, heads, -1)
    batch = max(wanted.shape[0], index.shape[0])
    centre = wanted.expand(batch, -1, -1).gather(2, index.expand(batch, -1, -1))
    bits, count = (8, 3) if dtype in (torch.bfloat16, torch.float16) else (_SIGNIFICAND[dtype], 2)
    base, ones = torch.full_like(centre, _DIGIT), torch.full_like(wanted, _DIGIT)
    left, right = [], []
    for near, there in zip(parts(centre, count, bits), parts(wanted, count, bits), strict=True):
        left += [-near, base]
        right += [ones, there]
    left, right = _hidden(left, right, keep, left[0])
    return _stacked(left, dtype), _stacked(right, dtype)


def padding_columns(queries: Tensor, dtype: torch.dtype, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns that only hide padding; (batch or 1, 1, q, c), (batch, 1, k, c)."""
    left, right = _hidden([], [], keep, torch.zeros(queries.shape, dtype=torch.float64, device=queries.device)[:, None])
    return _stacked(left, dtype), _stacked(right, dtype)


def extended(query: Tensor, key: Tensor, value: Tensor, added: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Prepend columns to query and key, and append zeros to the value, up to the same width.

    Args:
        query: (batch, heads, q, d).
        key: (batch, kv heads, k, d), with ``heads`` heads if the columns differ between heads.
        value: (batch, kv heads, k, d_v).
        added: the result of :func:`columns`.
    """
    left, right = (c.expand(t.shape[0], t.shape[1], -1, -1) for c, t in zip(added, (query, key), strict=True))
    query, key = torch.cat([left, query], -1), torch.cat([right, key], -1)
    return query, key, torch.nn.functional.pad(value, (0, query.shape[-1] - value.shape[-1]))


def _hidden(
    left: list[Tensor], right: list[Tensor], keep: Tensor | None, like: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    if keep is None:
        return left, right
    hide = torch.where(keep, 0.0, _HIDE_KEY).double()[:, None]  # batch, 1, k
    return [torch.full_like(like, _HIDE_QUERY), *left], [hide, *right]


def _stacked(found: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Stack columns as the last dimension, with zeros up to a multiple of eight, which GPU kernels ask for."""
    shape = torch.broadcast_shapes(*(c.shape for c in found))  # type: ignore[no-untyped-call]  # torch's
    blank = torch.zeros((), dtype=torch.float64, device=found[0].device).expand(shape)
    filled = [c.expand(shape) for c in found] + [blank] * (-len(found) % 8)
    return torch.stack(filled, -1).to(dtype)
