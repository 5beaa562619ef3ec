"""The comparison in one paragraph: what was lost, what was gained, as far as it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..evaluation import difference
from . import tables
from .tables import Metrics


def verdict(metrics: Metrics) -> str:
    """Return sentences of plain words and numbers; empty where nothing that matters was measured."""
    return " ".join(sentence for part in PARTS for sentence in part(metrics))


def loss(metrics: Metrics) -> Iterable[str]:
    """What the patch does to the loss, at the longest context and beside the shortest."""
    found = tables.losses(metrics)
    if found is None:
        return
    length = found["original"].lengths[-1]
    gap = difference(found["original"][length], found["patched"][length])
    interval = f"({gap.low:+.3f} to {gap.high:+.3f})"
    if gap.low <= 0 <= gap.high:
        yield f"At {length:,} tokens no difference of the loss is shown: {gap.value:+.3f} nats per token {interval}."
    else:
        way = "more" if gap.value > 0 else "less"
        yield f"At {length:,} tokens the patched model loses {abs(gap.value):.3f} nats per token {way} {interval}."


def cache(metrics: Metrics) -> Iterable[str]:
    """What is left of the cache."""
    before, after = (metrics[which].get("cache_bytes_per_token") for which in tables.BOTH)
    if before and after is not None:
        share = after / before
        yield "Its cache is as large." if share == 1 else f"Its cache is {share:.0%} of the original's."


def speed(metrics: Metrics) -> Iterable[str]:
    """How fast it decodes, at the longest context."""
    found = metrics["parts"].get("decoding")
    if found is not None:
        before, after = (found[which]["rows"][-1] for which in tables.BOTH)
        factor = after["decode_tokens_per_second"] / before["decode_tokens_per_second"]
        yield f"It decodes {factor:.2f} times as fast at {before['context']:,} tokens, on this machine."


def retrieval(metrics: Metrics) -> Iterable[str]:
    """What it finds, where the original finds anything."""
    found = tables.retrievals(metrics)
    if found is not None:
        before, after = (found[which].score().value for which in tables.BOTH)
        if before > 0 or after > 0:
            yield f"It finds {after:.0f} of 100 where the original finds {before:.0f}."
        else:
            yield "Neither model can do the retrieval task, so that it says nothing of the patch."


PARTS: tuple[Callable[[Metrics], Iterable[str]], ...] = (loss, cache, speed, retrieval)
