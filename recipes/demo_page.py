"""The demo's page, picture and closing lines, made from its metrics.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from itertools import pairwise
from typing import Any

from hf_attnpatch import charts
from hf_attnpatch.charts import Bar, Chart, Curve
from hf_attnpatch.comparing.page import STYLE, framed
from hf_attnpatch.diagnosing.diagnosis import size

Metrics = Mapping[str, Any]
WAYS = {  # score -> how the page calls it, its colour
    "averaged": ("averaged heads", "others"),
    "principal": ("principal", "ours"),
    "refined": ("refined", "ours"),
    "uptrained": ("then trained", "best"),
}
LINES = {"original": ("unpatched", "without"), "yarn": ("YaRN", "original"), "self_extend": ("SelfExtend", "ours")}
AUTHORS = {"original": "the original", **{name: called for name, (called, _) in WAYS.items()}}
MORE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: .9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem; }
.chart { width: 100%; height: auto; overflow: visible; }
figure { margin: 0; }
figcaption { color: var(--faint); font-size: .9rem; }
.written { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: 1rem; }
.written { margin-bottom: 1.5rem; }
.written pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0; font-size: .85rem; }
.written pre { max-height: 17rem; overflow-y: auto; }
.given, .mark { color: var(--faint); }
summary { cursor: pointer; color: var(--faint); }
.lead { font-size: 1.15rem; }
"""


def summary(found: Metrics) -> str:
    """The lines that the demo ends with."""
    scores, above, rates = found["scores"], found["differences"], found["decoding"]["tokens_per_second"]
    beyond = found["longer"]["beyond"]
    width = max(len(called) for called, _ in WAYS.values())
    lines = [f"nats per token; a key-value cache of {_share(found):.0%} (original: {scores['original']['nats']:.3f}):"]
    for name, (called, _) in WAYS.items():
        lines.append(f"  {called:{width}}  {scores[name]['nats']:.3f}  {above[name]['value']:+.3f}")
    lines.append(f"decoding: {rates['original']:,.0f} tokens a second, {rates['refined']:,.0f} with the smaller cache")
    if beyond["original"] is not None:
        told = ", ".join(f"{called} {beyond[name]:.2f}" for name, (called, _) in LINES.items())
        lines.append(f"beyond the trained {found['longer']['trained']:,} tokens: {told} nats per token")
    lines.append(f"{_loader(found)} loads the result: largest difference {found['reload']['max_difference']:g}")
    return "\n".join(lines)


def _share(found: Metrics) -> float:
    """How much of the cache is left."""
    scores = found["scores"]
    return float(scores["refined"]["cache_bytes_per_token"] / scores["original"]["cache_bytes_per_token"])


def _loader(found: Metrics) -> str:
    return "stock transformers" if found["reload"]["stock"] else "transformers with hf_attnpatch"


def picture(found: Metrics) -> str:
    """The demo in one SVG file: what a small cache loses in each way, and texts beyond the trained context."""
    chosen = (loss(found), longer(found))
    return charts.beside(chosen, " ".join(chart.alt for chart in chosen))


def loss(found: Metrics) -> Chart:
    """What each way to a smaller cache loses."""
    above = found["differences"]
    rows = [
        Bar(called, above[name]["value"], f"{above[name]['value']:+.2f}", colour)
        for name, (called, colour) in WAYS.items()
        if name in above
    ]
    return charts.bars(
        f"{_share(found):.0%} of the cache: what each way loses",
        rows,
        "nats per token above the original; less is better",
    )


def longer(found: Metrics) -> Chart:
    """Loss along documents that are longer than what the model was trained at."""
    long = found["longer"]
    middles = [(a + b) / 2 for a, b in pairwise(long["edges"])]
    curves = [
        Curve(called, list(zip(middles, long["nats"][name], strict=True)), colour)
        for name, (called, colour) in LINES.items()
    ]
    end = long["edges"][-1]
    ticks = {float(n): f"{n:,}" for n in range(0, end + 1, max(1, end // 4))}
    beyond = end > long["trained"]
    return charts.lines(
        "Texts longer than it was trained at, no training",
        curves,
        "nats per token, by tokens that came before; less is better",
        ticks=ticks,
        mark=(long["trained"], "trained up to here") if beyond else None,
    )


def course(found: Metrics) -> Chart | None:
    """Held-out loss during the training; None where it was not measured twice."""
    measured = [row for row in found["training"]["log"] if "heldout_loss" in row]
    before, original = found["scores"]["refined"]["nats"], found["scores"]["original"]["nats"]
    points = [(0.0, before), *((row["step"], row["heldout_loss"]) for row in measured)]
    if len(points) < 3:
        return None
    last = int(points[-1][0])
    return charts.lines(
        "A short training takes half of the rest away" if _halves(found) else "A short training",
        [Curve("trained", points, "best")],
        "nats per token on held-out text, by steps",
        ticks={float(n): str(n) for n in range(0, last + 1, max(1, last // 4))},
        level=(original, "the original"),
        height=190,
    )


def _halves(found: Metrics) -> bool:
    above = found["differences"]
    return bool(above["uptrained"]["value"] <= 0.5 * above["refined"]["value"])


def speed(found: Metrics) -> Chart:
    """Tokens per second with the big and the small cache."""
    rates = found["decoding"]["tokens_per_second"]
    rows = [
        Bar(called, rates[name], f"{rates[name]:,.0f}", colour)
        for name, called, colour in (("original", "original", "original"), ("refined", "refined", "ours"))
    ]
    work = found["decoding"]
    note = f"tokens a second, {work['batch']} texts of {work['context']:,} tokens; more is better"
    return charts.bars("Decoding, as measured on this machine", rows, note)


def cache(found: Metrics) -> Chart:
    """Bytes of keys and values."""
    held = found["decoding"]["cache_bytes"]
    rows = [
        Bar(called, held[name], size(held[name]), colour)
        for name, called, colour in (("original", "original", "original"), ("refined", "refined", "ours"))
    ]
    work = found["decoding"]
    return charts.bars(
        "Keys and values in memory", rows, f"{work['batch']} texts of {work['context']:,} tokens; less is better"
    )


def page(found: Metrics) -> str:
    """The page: one HTML file that asks nothing of anybody, for light and dark, narrow and wide."""
    title = "What one line does to a model"
    body = "\n".join([f"<h1>{title}</h1>", *_head(found), *_sections(found), *_foot(found)])
    return framed(title, f"{STYLE}\n{charts.variables()}{charts.RULES}{MORE}", body)


def _head(found: Metrics) -> Iterator[str]:
    above, beyond, share = found["differences"], found["longer"]["beyond"], _share(found)
    averaged, best = above["averaged"]["value"], above["uptrained"]["value"]
    yield (
        f'<p class="lead">The small model that ships with <code>hf_attnpatch</code> now keeps {share:.0%} of its keys '
        f"and values. Its loss rose by {best:+.3f} nats per token; averaging heads, the usual way, costs "
        f"{averaged:+.2f}. {_loader(found).capitalize()} loads the result and computes the same numbers (largest "
        f"difference {found['reload']['max_difference']:g}).</p>"
    )
    tiles = [
        (f"{share:.0%}", "of the cache is left"),
        (f"{best:+.3f}", "nats per token are lost"),
        (f"{found['decoding']['faster']:.2f} x", "as fast in decoding, measured here"),
    ]
    if beyond["original"] is not None:
        gained = beyond["original"] - beyond["self_extend"]
        tiles.append((f"{-gained:+.2f}", f"nats beyond {found['longer']['trained']:,} tokens with SelfExtend"))
    yield '<div class="tiles">'
    yield from (f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in tiles)
    yield "</div>"


def _sections(found: Metrics) -> Iterator[str]:
    diagnosis = found["diagnosis"]
    yield "<h2>The lack</h2>"
    yield (
        f"<p>To serve {diagnosis['batch']} texts of {diagnosis['context']:,} tokens, this model holds "
        f"{size(diagnosis['cache_bytes'])} of keys and values beside {size(diagnosis['weight_bytes'])} of weights. "
        f"A token waits {diagnosis['share']:.0%} of its time for them ({escape(str(diagnosis['hardware']).upper())}). "
        "<code>attnpatch diagnose</code> predicts that, and names what helps:</p>"
    )
    yield _code("\n".join(diagnosis["answers"]))
    yield f"<details><summary>All that it says</summary>{_code(diagnosis['page'])}</details>"
    yield "<h2>A smaller cache</h2>"
    yield '<div class="pair">'
    yield _figure(loss(found), _intervals(found))
    curve = course(found)
    if curve is not None:
        training = found["training"]
        steps = (
            f"{training['steps']:,} steps, {training['tokens']:,} tokens, {found['seconds']['uptrain']:.0f} seconds."
        )
        yield _figure(curve, f"The unpatched model teaches the patched one. {steps}")
    yield "</div>"
    yield "<h2>What it writes</h2>"
    yield "<p>The first draw of the same seed, whatever it is. The prompt is grey; ↵ is a line break.</p>"
    texts = found["texts"]
    for key, prompt in texts["prompts"].items():
        yield '<div class="written">'
        yield from (_written(AUTHORS[name], prompt, both[key]) for name, both in texts["written"].items())
        yield "</div>"
    yield "<h2>Memory and speed</h2>"
    yield '<div class="pair">'
    yield _figure(cache(found), "Of 32-bit floating point numbers.")
    yield _figure(
        speed(found), "Median of single tokens, the two models in turn. The longer the texts, the more is gained."
    )
    yield "</div>"
    yield "<h2>A longer context</h2>"
    yield '<div class="pair">'
    yield _figure(longer(found), f"The same {found['longer']['documents']} held-out documents for every line.")
    yield (
        "<div><p>The model was trained at "
        f"{found['longer']['trained']:,} tokens. Beyond them it fails, without a word. One line mends "
        "that, with the weights as they are:</p>"
        + _code(
            "ap.patch_rope_scaling(model, kind='yarn', factor=4.0)\nap.patch_self_extend(model, target_length=2048)"
        )
        + "<p>YaRN is a stock checkpoint, at no cost in speed. SelfExtend shows the model only distances "
        "that it knows, and its attention is dearer.</p></div>"
    )
    yield "</div>"


def _foot(found: Metrics) -> Iterator[str]:
    heads = found["job"]["patches"][0]["num_kv_heads"]
    yield "<h2>The same with your model</h2>"
    yield _code(
        "attnpatch diagnose MODEL --context 8192 --batch 16\n"
        f"attnpatch apply MODEL OUT --patch grouped_query:num_kv_heads={heads} --calibration TEXT\n"
        "attnpatch compare MODEL OUT --out report\n"
        "attnpatch docs"
    )
    here, first = found["machine"], found["scores"]["original"]
    said = (
        f"Measured on {first['tokens']:,} tokens of {first['documents']} documents that nothing here was fitted to, in "
        f"{found['seconds']['total']:.0f} seconds, on {here['device'].upper()} with {here['threads']} threads; torch "
        f"{here['torch']}, transformers {here['transformers']}, hf_attnpatch {here['hf_attnpatch']}. The model has 5.9 "
        "million parameters: it shows what is lost and gained, not how well a large model writes."
    )
    yield f"<p><small>{escape(said)}</small></p>"


def _intervals(found: Metrics) -> str:
    above = found["differences"]
    parts = [
        f"{called} {above[name]['low']:+.3f} to {above[name]['high']:+.3f}"
        for name, (called, _) in WAYS.items()
        if name in above
    ]
    took = ", ".join(f"{WAYS[name][0]} {_seconds(value)}" for name, value in found["converted_in"].items())
    return f"95 % intervals, paired by document: {'; '.join(parts)}. Converted in: {took}."


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"


def _figure(chart: Chart, caption: str) -> str:
    return f"<figure>{chart.svg()}<figcaption>{escape(caption)}</figcaption></figure>"


def _written(author: str, prompt: str, text: str) -> str:
    shown = escape(text).replace("\n", '<span class="mark">↵</span>\n')
    given = f'<span class="given">{escape(prompt)}</span>'
    return f"<figure><figcaption>{escape(author)}</figcaption><pre>{given}{shown}</pre></figure>"


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"
