"""The report of a comparison in words, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..publishing.card import in_words
from ..record import parse
from ..showing import code, fenced, prose
from . import tables
from .figures import Figure
from .tables import Metrics
from .verdict import verdict

WHAT = {
    "loss": "The same last {targets} tokens of {documents} windows of {text} are predicted under growing context, so "
    "that a difference between lengths is the context's. Truncated: only the last {window} tokens are seen. Sliding: "
    "the same, recomputed for every {stride} tokens. Intervals are 95 %, over windows; differences are paired.",
    "fidelity": "On {tokens} tokens of the same text: divergence of the patched model's next-token distribution from "
    "the original's, the share of tokens to which both give the same first choice, and of {continued} greedily decoded "
    "tokens after each row the share before the first that differs.",
    "retrieval": "{task}: {samples} prompts for each length and depth of the needle, scored by the published rule. "
    "Intervals are 95 %, over prompts.",
    "decoding": "One sequence, {dtype}, {threads} threads on {device}: prefill of the context, then token by token. "
    "The limit is what the memory of this machine delivers if weights and cache are read once for each token.",
    "layers": "Squared error of the output of each attention module over the variance of the original's, on "
    "{tokens} tokens of the same text: on the inputs that the module has in the original, and inside its own model.",
}


def render(metrics: Metrics, figures: Sequence[Figure]) -> str:
    """Return report.md."""
    names = [prose(metrics[which]["name"]) for which in tables.BOTH]
    said = filter(None, [verdict(metrics)])
    parts = [f"# {names[1]} against {names[0]}", *said, _models(metrics), "## In short", tables.summary(metrics)]
    shown = {figure.title: figure for figure in figures}
    for title, part, made in SECTIONS:
        found = metrics["parts"].get(part)
        if found is not None:
            figure = shown.get(title)
            drawn = [f"![{figure.alt}]({figure.file})"] if figure else []
            parts += [f"## {title}", explain(metrics, part), *drawn, *filter(None, [made(metrics)])]
    parts += [*_left_out(metrics), "## How this was measured", _how(metrics)]
    return "\n\n".join(parts) + "\n"


def explain(metrics: Metrics, part: str) -> str:
    """Describe what a part measured."""
    shown = {key: prose(value) if isinstance(value, str) else value for key, value in facts(metrics, part).items()}
    return WHAT[part].format(**shown)


def facts(metrics: Metrics, part: str) -> Mapping[str, Any]:
    """Return the numbers in the explanation of a part."""
    found = metrics["parts"][part]
    if part == "loss":
        one = found["original"]
        count = len(one["truncated"]["losses"])
        numbers = {key: f"{one[key]:,}" for key in ("targets", "window", "stride")}
        return {**numbers, "documents": count, "text": metrics["text"]}
    if part == "fidelity":
        return {"tokens": f"{found['kl']['tokens']:,}", "continued": found["continued"]}
    if part in ("retrieval", "decoding"):
        return dict(found["original"])
    return {key: f"{value:,}" for key, value in found.items() if isinstance(value, int)}


def _models(metrics: Metrics) -> str:
    lines = []
    for which in tables.BOTH:
        model = metrics[which]
        done = in_words(parse(model["record"])) if model.get("record") else []
        patches = ", ".join(map(code, done))
        context = f"context {model['context'] or 'not declared'}"
        said = f"{code(model['name'])}, {prose(model['architecture'])}, {prose(model['dtype'])}, {context}"
        lines.append(f"* **{which}**: {said}{f', patched: {patches}' if patches else ''}")
    return "\n".join(lines)


def _left_out(metrics: Metrics) -> list[str]:
    lines = [f"* {prose(part)}: {prose(why)}" for part, why in metrics["left_out"].items()]
    return ["## Not measured", "\n".join(lines)] if lines else []


def _how(metrics: Metrics) -> str:
    machine = ", ".join(prose(f"{key} {value}") for key, value in metrics["machine"].items())
    total = sum(metrics["seconds"].values())
    digests = "\n".join(f"* {which}: {code(metrics[which]['digest'])}" for which in tables.BOTH)
    return (
        f"{fenced(metrics['command'], 'sh')}\n\n{total / 60:.1f} minutes of measuring on: {machine}.\n\nDigests of the "
        f"models, which `push` holds a report to:\n\n{digests}"
    )


SECTIONS: tuple[tuple[str, str, Any], ...] = (
    ("Loss by context length", "loss", tables.loss_by_length),
    ("Fidelity to the original", "fidelity", tables.fidelity),
    ("Damage by layer", "layers", lambda _: None),
    ("Retrieval", "retrieval", tables.retrieval),
    ("Speed and cache", "decoding", tables.decoding),
)
