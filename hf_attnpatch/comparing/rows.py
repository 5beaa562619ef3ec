"""The rows of the summary: one function for each measure, which yields nothing if it was not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..evaluation import difference
from . import tables

Metrics = Mapping[str, Any]
Row = tuple[str, str, str, str]
NONE = "-"


def size(metrics: Metrics) -> Iterable[Row]:
    """Parameters."""
    yield _counts("parameters", *(metrics[which]["parameters"] for which in tables.BOTH))


def cache(metrics: Metrics) -> Iterable[Row]:
    """Cache."""
    found = [metrics[which].get("cache_bytes_per_token") for which in tables.BOTH]
    if None not in found and any(found):  # where neither keeps keys and values there is nothing to compare
        yield _counts("cache, bytes/token", *found)


def loss(metrics: Metrics) -> Iterable[Row]:
    """Loss at the longest context."""
    found = tables.losses(metrics)
    if found is not None:
        length = found["original"].lengths[-1]
        before, after = (found[which][length] for which in tables.BOTH)
        gap = difference(before, after)
        change = f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
        yield f"loss at {length:,} tokens, nats/token", f"{before.nats:.4f}", f"{after.nats:.4f}", change
        perplexities = before.perplexity, after.perplexity
        yield f"perplexity at {length:,} tokens", *_plain(*perplexities, ".3f")


def fidelity(metrics: Metrics) -> Iterable[Row]:
    """Divergence and agreement."""
    found = metrics["parts"].get("fidelity")
    if found is not None:
        yield "KL from the original, nats/token", "0", f"{found['kl']['nats']:.4f}", NONE
        yield "same first choice", "100 %", f"{found['top1']['value']:.1%}", NONE


def retrieval(metrics: Metrics) -> Iterable[Row]:
    """Mean score."""
    found = tables.retrievals(metrics)
    if found is not None:
        before, after = (found[which].score().value for which in tables.BOTH)
        yield f"retrieval ({found['original'].task}), of 100", *_plain(before, after, ".1f")


def decoding(metrics: Metrics) -> Iterable[Row]:
    """Decoding at the longest context."""
    found = metrics["parts"].get("decoding")
    if found is not None:
        before, after = (found[which]["rows"][-1] for which in tables.BOTH)
        rates = [row["decode_tokens_per_second"] for row in (before, after)]
        change = f"{rates[1] / rates[0] - 1:+.0%}"
        yield f"decoding at {before['context']:,} tokens, tokens/s", f"{rates[0]:.1f}", f"{rates[1]:.1f}", change


def layers(metrics: Metrics) -> Iterable[Row]:
    """The attention module with the largest damage."""
    found = metrics["parts"].get("layers")
    if found is not None:
        worst = max(range(len(found["alone"])), key=lambda i: float(found["alone"][i]))
        yield f"error of attention, worst module ({found['paths'][worst]})", "0", f"{found['alone'][worst]:.4f}", NONE


ROWS: tuple[Callable[[Metrics], Iterable[Row]], ...] = (
    size,
    cache,
    loss,
    fidelity,
    layers,
    retrieval,
    decoding,
)


def _counts(name: str, before: float, after: float) -> Row:
    return name, f"{before:,.0f}", f"{after:,.0f}", f"{after / before - 1:+.1%}" if before else NONE


def _plain(before: float, after: float, form: str) -> tuple[str, str, str]:
    change = after - before  # no number where both are infinite
    return format(before, form), format(after, form), NONE if change != change else format(change, f"+{form}")
