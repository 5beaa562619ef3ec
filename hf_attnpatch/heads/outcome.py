"""The settings and the result of a conversion."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .damage import LayerDamage
from .weights import HeadWeights


@dataclass(frozen=True)
class Recipe:
    """The settings of a conversion: the fields of :class:`~hf_attnpatch.GroupedQuery` that matter here."""

    num_kv_heads: int
    method: str
    grouping: str | None
    seed: int
    steps: int
    seconds: float | None


@dataclass
class Clock:
    """Wall time by stage, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class Conversion(Clock):
    """Shared weights by attention module, and what they cost."""

    weights: dict[str, HeadWeights] = field(default_factory=dict)
    layers: dict[str, LayerDamage] = field(default_factory=dict)
    total: int = 1  # attention modules in all
    notes: list[str] = field(default_factory=list)
