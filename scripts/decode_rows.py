"""Turns the times of `bench_decode` into the rows of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_attnpatch.evaluation.limits import best_of
from hf_attnpatch.evaluation.timing import median, ratio

Row = dict[str, Any]


def key(what: object, kv: int) -> str:
    """The name of a series of times: a path or a formulation, and a count of key-value heads."""
    return f"{what} | {kv}"


def contexts(found: Mapping[str, Any]) -> list[int]:
    """Those that were measured, in order."""
    return sorted({entry["context"] for entry in found["done"]})


def bandwidth(found: Mapping[str, Any], context: int) -> float:
    """Bytes a second: the best that a reader did while this context was measured."""
    return best_of(_pooled(found, context, "ms"), found["settings"]["buffer MiB"]).bytes_per_second


def arithmetic(found: Mapping[str, Any], context: int) -> float:
    """Operations a second: the best that the matrix product did while this context was measured."""
    return best_of(_pooled(found, context, "ms"), found["settings"]["buffer MiB"]).flops_per_second


def must_read(found: Mapping[str, Any], kv: int, context: int) -> tuple[int, int]:
    """Bytes of weights and of the cache that one step must read."""
    (row,) = [row for row in found["variants"] if row["kv"] == kv]
    return row["weight bytes"], round(row["bytes a token"] * context * found["settings"]["batch"])


def steps(found: Mapping[str, Any]) -> list[Row]:
    """A row for each path, context and count of key-value heads."""
    rows = []
    for context in contexts(found):
        ms, seen = _pooled(found, context, "ms"), {}
        for entry in found["done"]:
            seen |= entry["sdpa"] if entry["context"] == context else {}
        paths = dict.fromkeys(name.partition(" | ")[0] for name in seen)
        rows += [
            _step(found, path, context, kv, ms) | {"sdpa": seen[key(path, kv)]} for path in paths for kv in _kv(found)
        ]
    return sorted(rows, key=lambda row: (row["path"], row["context"], -row["kv"]))


def _step(found: Mapping[str, Any], path: str, context: int, kv: int, ms: Mapping[str, list[float]]) -> Row:
    own, first, batch = ms[key(path, kv)], ms[key(path, _kv(found)[0])], found["settings"]["batch"]
    weights, cache = must_read(found, kv, context)
    least, (gain, interval) = 1e3 * (weights + cache) / bandwidth(found, context), ratio(first, own)
    return {
        **{"path": path, "context": context, "kv": kv, "weight bytes": weights, "cache bytes": cache},
        **{"ms": median(own), "tokens/s": 1e3 * batch / median(own), "limit tokens/s": 1e3 * batch / least},
        **{"of the limit": least / median(own), "speed-up": gain, "interval": interval},
        "speed-up by bytes": sum(must_read(found, _kv(found)[0], context)) / (weights + cache),
    }


def alone(found: Mapping[str, Any]) -> list[Row]:
    """A row for each formulation of the attention, context and count of key-value heads."""
    rows = []
    for context in contexts(found):
        ms = _pooled(found, context, "alone")
        operations = found["attention operations a token"] * context * found["settings"]["batch"]
        for name in ms:
            how, _, kv = name.partition(" | ")
            seconds, (gain, interval) = median(ms[name]) / 1e3, ratio(ms[key(how, _kv(found)[0])], ms[name])
            rate, ideal = must_read(found, int(kv), context)[1] / seconds, operations / arithmetic(found, context)
            rows.append({"how": how, "context": context, "kv": int(kv), "ms": 1e3 * seconds, "GB/s": rate / 1e9})
            rows[-1] |= {"of the limit": rate / bandwidth(found, context), "of the arithmetic": ideal / seconds}
            rows[-1] |= {"speed-up": gain, "interval": interval}
    return rows


def _kv(found: Mapping[str, Any]) -> list[int]:
    return sorted((row["kv"] for row in found["variants"]), reverse=True)


def _pooled(found: Mapping[str, Any], context: int, part: str) -> dict[str, list[float]]:
    """The milliseconds of all passes at one context, round by round."""
    pooled: dict[str, list[float]] = {}
    for entry in found["done"]:
        for name, times in entry[part].items() if entry["context"] == context else ():
            pooled.setdefault(name, []).extend(times)
    return pooled
