"""Machines by their published figures: dense peak rates, so that times are bounds from below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .machine import BANDWIDTH

_FLASH2 = "attention: 35 % of that, as 2407.08608 measured for FlashAttention-2 on an H100"
_AMPERE = "attention: 73 % of that, the most that 2307.08691 measured for FlashAttention-2 on an A100"
_SHEET = "data sheet (dense peak rates, so times are bounds from below; no launch overhead)"


def _row(
    name: str, source: str, memory: float, bandwidth: float, single: float, half: float, share: float
) -> Mapping[str, Any]:
    """Return a machine.

    Args:
        name: of the product.
        source: where the figures are from.
        memory: in bytes.
        bandwidth: in bytes per second.
        single: operations per second in float32, outside of reduced-precision units.
        half: operations per second in bfloat16 and float16, accumulated in float32, without sparsity.
        share: of ``half`` that fused attention reaches.
    """
    rates = {"float32": (single, single), "bfloat16": (half, share * half), "float16": (half, share * half)}
    return {
        "name": name,
        "source": source,
        "memory_bytes": memory,
        "rates": {
            dtype: {"matmul": product, "attention": attention, BANDWIDTH: bandwidth}
            for dtype, (product, attention) in rates.items()
        },
    }


TABLE: Mapping[str, Mapping[str, Any]] = {
    "a100": _row("NVIDIA A100 SXM4 80 GB", f"NVIDIA {_SHEET}; {_AMPERE}", 80e9, 2.039e12, 19.5e12, 312e12, 0.73),
    "h100": _row("NVIDIA H100 SXM5 80 GB", f"NVIDIA {_SHEET}; {_FLASH2}", 80e9, 3.35e12, 67e12, 989e12, 0.35),
    "h200": _row("NVIDIA H200 SXM 141 GB", f"NVIDIA {_SHEET}; {_FLASH2}", 141e9, 4.8e12, 67e12, 989e12, 0.35),
    "l4": _row("NVIDIA L4 24 GB", f"NVIDIA {_SHEET}; {_AMPERE}", 24e9, 300e9, 30.3e12, 121e12, 0.73),
    "rtx4090": _row(
        "NVIDIA GeForce RTX 4090 24 GB",
        f"Ada architecture whitepaper, appendix A ({_SHEET}); {_AMPERE}",
        *(24e9, 1.008e12, 82.6e12, 165.2e12, 0.73),
    ),
    "mi300x": _row(
        "AMD Instinct MI300X 192 GB",
        f"AMD {_SHEET}; attention: as fast as products, for no share is published",
        *(192e9, 5.3e12, 163.4e12, 1307.4e12, 1.0),
    ),
    "laptop": _row(  # two operations a core and cycle; twice that in tensor cores, as in other GeForce of this kind
        "laptop with NVIDIA GeForce RTX 4060 Laptop GPU 8 GB",
        f"worked out from 3072 cores at 2.37 GHz and 16 Gbit/s on 128 bits, NVIDIA {_SHEET}; {_AMPERE}",
        *(8e9, 256e9, 14.6e12, 29.1e12, 0.73),
    ),
}
