"""Machines by their published dense peak rates, which give lower bounds of times."""

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


# Held in November 2026 against pages that quote the vendors' sheets (named beside each; the sheets themselves could not
# be opened), and against cores times clock. Where a sheet counts sparsity, half of its figure stands here.
TABLE: Mapping[str, Mapping[str, Any]] = {
    # hmc-tech.com, "NVIDIA L4 vs NVIDIA A100 40GB": 311.9 bfloat16, 19.49 float32 (80 GB's memory was not looked up)
    "a100": _row("NVIDIA A100 SXM4 80 GB", f"NVIDIA {_SHEET}; {_AMPERE}", 80e9, 2.039e12, 19.5e12, 312e12, 0.73),
    # lzwjava.github.io, "NVIDIA H200 GPU Specifications": 80 GB, 3.35 TB/s; rates as the H200's, the same die
    "h100": _row("NVIDIA H100 SXM5 80 GB", f"NVIDIA {_SHEET}; {_FLASH2}", 80e9, 3.35e12, 67e12, 989e12, 0.35),
    # itkb.uw.cz, "NVIDIA H200 vs B300": 141 GB, 4.8 TB/s, 989 bfloat16 dense; hmc-tech.com: 66.9 float32
    "h200": _row("NVIDIA H200 SXM 141 GB", f"NVIDIA {_SHEET}; {_FLASH2}", 141e9, 4.8e12, 67e12, 989e12, 0.35),
    # grokipedia.com, "NVIDIA L4 vs L40S": 24 GB, 300 GB/s, 242 with sparsity; fpsbench.com: 30.29 float32. At the
    # highest clock, 2.04 GHz, 125 dense (hmc-tech.com); the sheet's figure is the lower one
    "l4": _row("NVIDIA L4 24 GB", f"NVIDIA {_SHEET}; {_AMPERE}", 24e9, 300e9, 30.3e12, 121e12, 0.73),
    # waredb.com, "NVIDIA GeForce RTX 4090": 24 GB, 1008 GB/s, 165.15 bfloat16 dense, 82.58 float32
    "rtx4090": _row(
        "NVIDIA GeForce RTX 4090 24 GB",
        f"Ada architecture whitepaper, appendix A ({_SHEET}); {_AMPERE}",
        *(24e9, 1.008e12, 82.6e12, 165.2e12, 0.73),
    ),
    # METHODOLOGY.md of github.com/alpharomercoma/MI300X-vs-H200: 192 GB, 5.3 TB/s, 1307.4 bfloat16 dense; float32 is
    # 304 units * 256 operations * 2.1 GHz
    "mi300x": _row(
        "AMD Instinct MI300X 192 GB",
        f"AMD {_SHEET}; attention: as fast as products, for no share is published",
        *(192e9, 5.3e12, 163.4e12, 1307.4e12, 1.0),
    ),
    # data-check.eu, "NVIDIA GeForce RTX 4060 Laptop GPU": cores, memory, the highest clock (at 115 W); two operations a
    # core and cycle; twice that in tensor cores, as in the RTX 4090
    "laptop": _row(
        "laptop with NVIDIA GeForce RTX 4060 Laptop GPU 8 GB",
        f"worked out from 3072 cores at 2.37 GHz and 16 Gbit/s on 128 bits, NVIDIA {_SHEET}; {_AMPERE}",
        *(8e9, 256e9, 14.6e12, 29.1e12, 0.73),
    ),
}
