"""The rates of a machine as a table: the time of an operation, and the points that it needs in the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import EvaluationError
from .kinds import STREAMS
from .listener import Operation
from .result import Result

MIB = 2**20
SMALL, LARGE = 2**16, 256 * MIB  # working sets between which memory is told apart, in bytes
_FEW_ROWS = 16  # up to here a product waits for its weights, not for its arithmetic
_ROWS, _INNER, _ELEMENTS, _KEYS = 512, 4096, 2**25, 8192  # beyond these, rates no longer change
BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Point(Result):
    """A rate at a size.

    Attributes:
        kind: ``matmul``, ``attention`` or ``attention_backward``, in operations per second; the name of a loop, or
            ``bandwidth`` for all of them, in bytes per second.
        dtype: such as ``float32``.
        size: what it was measured at; empty for a rate that holds at every size.
        rate: per second.
    """

    kind: str
    dtype: str
    size: tuple[tuple[str, int], ...]
    rate: float


@dataclass(frozen=True)
class Machine(Result):
    """A table of rates.

    Attributes:
        name: of the processor or the row.
        source: where the numbers are from.
        threads: that the rates were measured with; 0 where that has no meaning.
        memory_bytes: capacity; 0 where it is not known.
        call_seconds: of a forward beside its operations.
        operation_seconds: of each operation beside its loop: dispatch, and the Python around it.
        fresh_bytes: above this an allocation may come from the system and go back to it; 0 where none does.
        fresh_seconds: of each byte of memory that comes from the system, beside writing it.
        points: the rates.
    """

    name: str
    source: str
    threads: int
    memory_bytes: int
    call_seconds: float
    operation_seconds: float
    fresh_bytes: int
    fresh_seconds: float
    points: tuple[Point, ...]

    def seconds(self, op: Operation) -> float:
        """Return the time of an operation's loop: arithmetic or memory, whichever takes longer.

        Raises:
            EvaluationError: the table has no rate for it.
        """
        if op.kind == "view":
            return 0.0
        return self._streams(op) if op.kind in STREAMS else self._products(op)

    def reading(self, op: Operation) -> float:
        """Return the time of reading an operation's inputs, however they are multiplied."""
        dtype = _floating(op.dtype)
        return sum(n / self._nearest("reduce", dtype, {"set": _set(n, age)}).rate for n, age in op.reads)

    def moving(self, size: int, dtype: str) -> float:
        """Return the time of a plain loop over this many bytes, which no cache holds."""
        return size / self._nearest("pointwise", dtype, {"set": LARGE}).rate

    def lacking(self, operations: Iterable[Operation]) -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
        """Return the points (kind, dtype, size) that operations need and the table lacks."""
        have = {(p.kind, p.dtype, p.size) for p in self.points}
        wanted = (point for op in operations for point in needs(op))
        return list(dict.fromkeys(point for point in wanted if point not in have))

    def extended(self, points: Iterable[Point]) -> Machine:
        """Return the same machine with more points."""
        return replace(self, points=(*self.points, *points))

    def _products(self, op: Operation) -> float:
        if not op.flops:
            return 0.0
        kind, dtype, size = next(needs(op))
        point = self._nearest(kind, dtype, dict(size))
        arithmetic = op.flops / point.rate
        if point.size:
            return arithmetic  # measured as it is, memory included
        moved = [(n, age) for n, age in op.reads] + [(op.written, 0)]
        return max(arithmetic, sum(n / self._nearest("copy", dtype, {"set": _set(n, age)}).rate for n, age in moved))

    def _streams(self, op: Operation) -> float:
        """Return the time of a loop; a rate includes reads, by their distance, and writes of the same size."""
        dtype = _floating(op.dtype)
        reading = sum(n / self._nearest(op.kind, dtype, {"set": _set(n, age)}).rate for n, age in op.reads if n)
        read = sum(n for n, _ in op.reads)
        alike = min(read, op.written)
        more = (op.written - alike) / self._nearest(op.kind, dtype, {"set": _set(op.written, 0)}).rate
        return reading + (reading * alike / read if read else 0.0) + more

    def _nearest(self, kind: str, dtype: str, size: Mapping[str, int]) -> Point:
        kinds = {"attention_backward": ("attention_backward", "attention")}.get(kind, (kind,))
        for name in (*kinds, *((BANDWIDTH,) if kind in STREAMS else ())):
            if found := [p for p in self.points if p.kind == name and p.dtype == dtype]:
                return min(found, key=lambda p: _distance(p.size, size))
        if kind in STREAMS and (found := [p for p in self.points if p.kind in (kind, BANDWIDTH)]):  # a byte is a byte
            return min(found, key=lambda p: _distance(p.size, size))
        have = sorted({f"{p.kind} in {p.dtype}" for p in self.points})
        raise EvaluationError(
            f"hardware {self.name}: no rate for {kind} in {dtype}; the table has {', '.join(have)}. Add it, or choose "
            "hardware='auto', which measures what it lacks."
        )


def needs(op: Operation) -> Iterator[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """Yield the points that determine an operation's time, at sizes rounded to where rates differ."""
    dtype, size = _floating(op.dtype), dict(op.size)
    if op.kind == "matmul":
        yield op.kind, dtype, tuple(_product_size(size, op).items())
    elif op.kind.startswith("attention"):
        yield op.kind, dtype, tuple(_attention_size(size, op).items())
        if size["queries"] <= _FEW_ROWS:  # how long the cache takes to read is told apart from what is done with it
            yield from (("reduce", dtype, (("set", _set(n, age)),)) for n, age in op.reads)
    elif op.kind in STREAMS:
        for n, age in (*op.reads, (op.written, 0)):
            if n:
                yield op.kind, dtype, (("set", _set(n, age)),)


def _product_size(size: Mapping[str, int], op: Operation) -> dict[str, int]:
    rows, inner = size["rows"], min(size["inner"], _INNER)
    columns = max(min(size["columns"], _ELEMENTS // inner), 1)
    few = rows <= _FEW_ROWS
    rows = rows if few else min(_power(rows), _ROWS)
    own, age = max(op.reads)
    return {
        **{"rows": rows, "inner": inner, "columns": columns, "batch": min(_power(size["batch"]), 8)},
        "set": _set(own, age) if few else 0,
    }


def _attention_size(size: Mapping[str, int], op: Operation) -> dict[str, int]:
    keys = min(_power(size["keys"]), _KEYS)
    one = size["queries"] <= _FEW_ROWS
    own, age = max(op.reads)
    return {
        **{"queries": size["queries"] if one else min(_power(size["queries"]), keys), "keys": keys},
        **{"head_dim": size["head_dim"], "group": size["group"], "causal": size["causal"]},
        **{"heads": min(size["heads"], 16) if one else 1, "set": _set(2 * own, age) if one else 0},
    }


def _set(own: int, age: int) -> int:
    """Return the size of a cyclic working set in which a tensor would be reused as late as here."""
    half_octaves = round(2 * math.log2(max(own + age, 1)))
    return min(max(round(2 ** (half_octaves / 2)), SMALL), LARGE)


def _power(n: int) -> int:
    return 2 ** round(math.log2(n)) if n > 0 else 1


def _floating(dtype: str) -> str:
    return dtype if "float" in dtype else "float32"


def _distance(have: tuple[tuple[str, int], ...], want: Mapping[str, int]) -> float:
    """Return the distance of two sizes, in factors of e; a rate without a size is farther than any with one."""
    if not have:
        return math.inf
    return sum(abs(math.log((value + 1) / (want.get(name, value) + 1))) for name, value in have)
