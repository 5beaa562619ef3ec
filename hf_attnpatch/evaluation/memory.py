"""Memory in bytes: of a cache, of the weights that a step reads, of a process at its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def held_bytes(cache: Any) -> int:
    """Return the bytes of all tensors that a cache holds now: keys, values, states."""
    return sum(t.numel() * t.element_size() for t in held_tensors(cache))


def held_tensors(cache: Any) -> list[Tensor]:
    """Return the tensors that a cache holds now."""
    layers = cache.layers if hasattr(cache, "layers") else [cache]
    return [t for layer in layers for t in tree_leaves(list(vars(layer).values())) if isinstance(t, Tensor)]


def weight_bytes(model: nn.Module, batch: int) -> int:
    """Return the bytes of weights that one step reads: all but one row per sequence of an untied embedding."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    rows = sum(batch * w.shape[1] * w.element_size() for w in tables)
    aside = {id(w) for w in tables} - heads
    return rows + sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in aside)


class Peak:
    """The largest memory in use between start and stop; all None if the system does not report it.

    Attributes:
        before: bytes in use at the start.
        bytes: at the highest.
    """

    before: int | None = None
    bytes: int | None = None

    @property
    def more(self) -> int | None:
        """Bytes at the peak, above those at the start."""
        return None if self.bytes is None or self.before is None else self.bytes - self.before


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of a device's allocations or, on a CPU under Linux, of the process, all it held before included.

    Args:
        device: where the model is.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    with contextlib.suppress(OSError):  # no such file, or not allowed: the peak stays None
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now: proc(5)
        peak.before = resident()
    yield peak
    if peak.before is not None:
        peak.bytes = _status("VmHWM")


def resident() -> int:
    """Return the bytes of this process that are in memory now, under Linux.

    Raises:
        OSError: this system does not say.
    """
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
