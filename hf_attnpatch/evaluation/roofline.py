"""The time of a model's pass on a machine: the sum of its operations, by purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .heap import Heap
from .listener import PARTS, Operation, Pass
from .machine import Machine
from .result import Result


@dataclass(frozen=True)
class Phase(Result):
    """The cost of a pass.

    Attributes:
        seconds: in all.
        parts: seconds by part: products with weights; what copies, repeats and reads the cache; attention beyond that;
            the rest, with the overhead of every operation.
        overhead_seconds: the part of ``rest`` that is dispatch and Python.
        flops: multiplications and additions.
        traffic_bytes: read and written, each operation by itself.
        operations: how many.
    """

    seconds: float
    parts: dict[str, float]
    overhead_seconds: float
    flops: int
    traffic_bytes: int
    operations: int

    @property
    def largest(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def cost(machine: Machine, what: Pass) -> Phase:
    """Add up a pass.

    Args:
        machine: with every rate that the pass needs.
        what: from :class:`hf_attnpatch.evaluation.operations.Phantom`.

    Raises:
        EvaluationError: the machine's table lacks a rate.
    """
    overhead = machine.call_seconds + len(what.operations) * machine.operation_seconds
    parts = dict.fromkeys(PARTS, 0.0) | {"rest": overhead}
    heap = Heap(machine.fresh_bytes)
    for op in what.operations:
        seconds = machine.seconds(op) + heap.fresh(op) * machine.fresh_seconds
        reading = min(machine.reading(op), seconds) if op.kind == "attention" and _decodes(op) else 0.0
        parts["cache"] += reading
        parts[op.part] += seconds - reading
    return Phase(
        seconds=sum(parts.values()),
        parts=parts,
        overhead_seconds=overhead,
        flops=sum(op.flops for op in what.operations),
        traffic_bytes=sum(sum(n for n, _ in op.reads) + op.written for op in what.operations),
        operations=len(what.operations),
    )


def _decodes(op: Operation) -> bool:
    size = dict(op.size)
    return size["queries"] == 1 < size["keys"]


def unmeasured(machine: Machine, passes: Iterable[Pass]) -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """Return the points that the passes need and the machine lacks."""
    return machine.lacking(op for each in passes for op in each.operations)
