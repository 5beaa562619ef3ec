"""Models the allocator: which allocations come from the operating system."""

from __future__ import annotations

from collections import Counter

from .listener import Operation


class Heap:
    """An allocator that behaves like glibc's malloc(3) after its thresholds have settled.

    What is freed is kept, up to twice ``threshold``, and then all given back; what is as large as that and does
    not fit into what is kept comes from the system and goes back to it at once. Fragments are not modelled.

    Args:
        threshold: bytes; 0 for an allocator that keeps everything, as CUDA's does.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold
        self.kept = 2 * threshold  # bytes that are free and in the process
        self.mapped: Counter[int] = Counter()  # sizes that came from the system for themselves

    def fresh(self, op: Operation) -> int:
        """Return how many bytes of an operation's allocations come from the system."""
        if not self.threshold:
            return 0
        for size in op.freed:
            self._free(size)
        return sum(self._take(size) for size in op.allocated)

    def _free(self, size: int) -> None:
        if self.mapped[size]:
            self.mapped[size] -= 1
            return
        self.kept += size
        if self.kept > 2 * self.threshold:
            self.kept = 0

    def _take(self, size: int) -> int:
        if size <= self.kept:
            self.kept -= size
            return 0
        if size >= self.threshold:
            self.mapped[size] += 1
            return size
        more, self.kept = size - self.kept, 0
        return more
