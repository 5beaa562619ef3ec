"""The limits of this machine: one large product, one large read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .result import Result
from .timing import Work, in_turns

_SIDE = 1024
PRODUCT_OPERATIONS = 2 * _SIDE**3  # a multiplication and an addition are two


def readers(mib: int, device: torch.device | None = None) -> dict[Any, Work]:
    """Return functions that read a buffer of this many MiB once, by torch's own loops."""
    buffer = torch.randn(mib * 2**18, device=device)
    half = len(buffer) // 2
    return {"sum": Work(buffer.sum), "dot": Work(lambda: torch.dot(buffer[:half], buffer[half:]))}


def product(dtype: torch.dtype, device: torch.device | None = None) -> dict[Any, Work]:
    """Return a large matrix product of :data:`PRODUCT_OPERATIONS`."""
    a, b = torch.randn(2, _SIDE, _SIDE, device=device).to(dtype)
    return {"product": Work(lambda: a @ b)}


@dataclass(frozen=True)
class Limits(Result):
    """The best measurements.

    Attributes:
        flops_per_second: of a matrix product of 1024 x 1024, in the model's dtype.
        bytes_per_second: of reading a buffer that no cache holds.
    """

    flops_per_second: float
    bytes_per_second: float


def limits(dtype: torch.dtype, device: torch.device, *, mib: int = 256, rounds: int = 5) -> Limits:
    """Measure the limits of a device, with as many threads as torch now uses.

    Args:
        dtype: of the product.
        device: where.
        mib: size of the buffer that is read; several times the largest cache.
        rounds: of which the best counts.
    """
    return best_of(in_turns({**readers(mib, device), **product(dtype, device)}, rounds), mib)


def best_of(ms: Mapping[str, list[float]], mib: int) -> Limits:
    """Return the limits from the milliseconds of :func:`readers` and :func:`product`."""
    flops = PRODUCT_OPERATIONS / min(ms["product"]) * 1e3
    return Limits(flops, float(mib * 2**20 / min(ms["sum"] + ms["dot"]) * 1e3))
