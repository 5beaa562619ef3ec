"""The tables of a comparison, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation import LossByLength, Retrieval, difference
from ..showing import prose

Metrics = Mapping[str, Any]
BOTH = ("original", "patched")


def losses(metrics: Metrics) -> dict[str, LossByLength] | None:
    """Return the losses of both models, or None if they were not measured."""
    found = metrics["parts"].get("loss")
    return None if found is None else {which: LossByLength.from_dict(found[which]) for which in BOTH}


def summary(metrics: Metrics) -> str:
    """The comparison in a table: a row for each measure."""
    from . import rows

    lines = [row for measure in rows.ROWS for row in measure(metrics)]
    return table(("", "original", "patched", "change"), lines)


def loss_by_length(metrics: Metrics) -> str | None:
    """Loss of the same last tokens under growing context."""
    found = losses(metrics)
    if found is None:
        return None
    one, other = found["original"], found["patched"]
    rows = []
    names = [f"{length:,} tokens" for length in one.lengths]
    scores = [*zip(names, one.scores, other.scores, strict=True)]
    scores.append((f"{one.window:,}, truncated", one.truncated, other.truncated))
    scores.append((f"{one.window:,}, sliding", one.sliding, other.sliding))
    for name, before, after in scores:
        gap = difference(before, after)
        cells = [f"{s.nats:.4f} ({s.low:.3f} to {s.high:.3f})" for s in (before, after)]
        rows.append((name, *cells, f"{gap.value:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"))
    return table(("context", "original, nats/token", "patched, nats/token", "patched - original, paired"), rows)


def fidelity(metrics: Metrics) -> str | None:
    """Fidelity of the patched model to the original."""
    found = metrics["parts"].get("fidelity")
    if found is None:
        return None
    kl, rows = found["kl"], []
    rows.append(("KL divergence, nats/token", f"{kl['nats']:.5f}", f"{kl['low']:.5f} to {kl['high']:.5f}"))
    for name, key in (("same first choice", "top1"), ("same greedy tokens", "continuation")):
        if found[key] is not None:
            share = found[key]
            rows.append((name, f"{share['value']:.1%}", f"{share['low']:.1%} to {share['high']:.1%}"))
    return table(("", "patched against original", "95 % interval, over rows"), rows)


def retrievals(metrics: Metrics) -> dict[str, Retrieval] | None:
    """Return the retrieval results of both models, or None if they were not measured."""
    found = metrics["parts"].get("retrieval")
    return None if found is None else {which: Retrieval.from_dict(found[which]) for which in BOTH}


def retrieval(metrics: Metrics) -> str | None:
    """Score by length of the prompt."""
    found = retrievals(metrics)
    if found is None:
        return None
    rows = []
    for length in (*found["original"].lengths, None):
        before, after = (found[which].score(length) for which in BOTH)
        cells = [f"{s.value:.1f} ({s.low:.0f} to {s.high:.0f})" for s in (before, after)]
        rows.append(("all" if length is None else f"{length:,} tokens", *cells, f"{after.value - before.value:+.1f}"))
    return table(("prompt", "original, of 100", "patched, of 100", "change"), rows)


def decoding(metrics: Metrics) -> str | None:
    """Speed and cache by context."""
    found = metrics["parts"].get("decoding")
    if found is None:
        return None
    rows = []
    for before, after in zip(found["original"]["rows"], found["patched"]["rows"], strict=True):
        context = f"{before['context']:,} tokens"
        for what, key, scale in (
            ("prefill, tokens/s", "prefill_tokens_per_second", 1),
            ("decoding, tokens/s", "decode_tokens_per_second", 1),
            ("cache, MB", "cache_bytes", 1e6),
        ):
            one, other = before[key] / scale, after[key] / scale
            rows.append((f"{context}: {what}", f"{one:,.1f}", f"{other:,.1f}", f"{other / one - 1:+.0%}"))
    return table(("", "original", "patched", "change"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of plain texts; numbers to the right, the first column to the left."""
    marks = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(map(prose, row)) + " |" for row in (head, marks, *rows))
