"""The recipes' figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_attnpatch.plotting import import_pyplot


def loss_curve(
    records: Sequence[Mapping[str, float]], path: Path, *, title: str, levels: Mapping[str, float] | None = None
) -> None:
    """Draws a training log as a PNG: training loss, held-out loss where logged, and horizontal levels.

    Args:
        records: lines of `log.jsonl`, losses in nats a token.
        path: where the PNG goes.
        title: above the figure.
        levels: name and loss of reference lines, such as a baseline.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*_series(records, "loss"), color="#4477aa", linewidth=1, label="training")
    steps, values = _series(records, "heldout_loss")
    if values:
        axes.plot(steps, values, color="#cc3311", marker="o", markersize=3, label="held out")
    for (name, level), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="#666666", linestyle=style, label=f"{name} {level:.2f}")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _series(records: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    chosen = [record for record in records if key in record]
    return [record["tokens"] / 1e6 for record in chosen], [record[key] for record in chosen]
