"""The table at the end of an uptraining, from its metrics.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_attnpatch.patch import off_default


def show(metrics: Mapping[str, Any]) -> None:
    """Prints the table and below it what holds for the whole run; paths are not broken over lines."""
    console = Console()
    console.print(render(metrics))
    console.print(facts(metrics), soft_wrap=True, highlight=False, markup=False)


def render(metrics: Mapping[str, Any]) -> Table:
    """The stages side by side.

    Args:
        metrics: what `uptrain.py` writes to metrics.json.
    """
    scores = metrics["scores"]
    table = Table(title=_title(metrics), title_justify="left")
    table.add_column("")
    for stage in scores:
        table.add_column(stage, justify="right")

    def row(name: str, values: Iterable[str]) -> None:
        cells = list(values)
        table.add_row(name, *[""] * (len(scores) - len(cells)), *cells)

    differences, seconds = metrics["differences"], metrics["seconds"]
    row("loss (nats/token)", (f"{score['nats']:.4f}" for score in scores.values()))
    row("  95 % interval", (f"{score['low']:.3f} to {score['high']:.3f}" for score in scores.values()))
    row("above the original", (f"{found['value']:+.4f}" for found in differences.values()))
    row("  95 %, paired", (f"{found['low']:+.3f} to {found['high']:+.3f}" for found in differences.values()))
    if differences["converted"]["value"] > 0:
        mended = 1 - differences["uptrained"]["value"] / differences["converted"]["value"]
        row("damage mended", [f"{mended:.0%}"])
    row("perplexity", (f"{score['perplexity']:.2f}" for score in scores.values()))
    row("cache (bytes/token)", (f"{score['cache_bytes_per_token']:,.0f}" for score in scores.values()))
    row("seconds", (f"{seconds['convert']:.1f}", f"{seconds['uptrain']:.1f}"))
    return table


def _title(metrics: Mapping[str, Any]) -> str:
    job = metrics["job"]
    fields = [", ".join(f"{key}={value}" for key, value in off_default(patch).items()) for patch in job["patches"]]
    patches = " + ".join(f"{patch['patch']}({each})" for patch, each in zip(job["patches"], fields, strict=True))
    return f"{job['model']}: {patches}"


def facts(metrics: Mapping[str, Any]) -> str:
    """What holds for the whole run: the reload, the texts, the time, the files."""
    job, score, training, reload = (
        metrics["job"],
        metrics["scores"]["original"],
        metrics["training"],
        metrics["reload"],
    )
    loader = "stock transformers" if reload["stock"] else "transformers with hf_attnpatch imported"
    lines = [
        f"{loader} reload: max difference {reload['max_difference']:g}",
        f"measured on {score['tokens']:,} tokens of {score['documents']} documents: {job['heldout']['source']}",
        f"uptrained ({job['loss']}, {job['trainable']}) on {training['tokens']:,} tokens of: {job['data']['source']}",
        f"{metrics['seconds']['total']:.0f} seconds after start-up, on {metrics['machine']['processes']} process(es), "
        f"{metrics['machine']['threads']} thread(s) each",
        *(f"{name}: {path}" for name, path in metrics["files"].items()),
    ]
    return "\n".join(lines)
