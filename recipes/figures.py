"""The figures of an uptraining. Colours are Okabe and Ito's, told apart by colour-blind readers; markers differ too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attnpatch.plotting import import_pyplot

STAGES = {"original": ("#0072B2", "o"), "converted": ("#D55E00", "s"), "uptrained": ("#009E73", "D")}
TRAINING = "#555555"
LOSS_NAMES = {
    "distillation": "KL from the original\n(nats per token)",
    "layerwise_distillation": "KL and output error,\nmean (per token)",
    "cross_entropy": "training loss\n(nats per token)",
}


def loss_curve(
    log: Sequence[Mapping[str, float]], levels: Mapping[str, float], path: Path, *, loss: str, text: str
) -> None:
    """Draws the training loss above and the held-out loss below, with the levels before and after training.

    Args:
        log: records of the loop, in nats per token.
        levels: stage -> loss on the same text as the log's held-out loss.
        path: where the PNG goes.
        loss: name of the training loss in `LOSS_NAMES`.
        text: which text the held-out loss is on.
    """
    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    above.plot(*_series(log, "loss"), color=TRAINING, marker=".", markersize=4, linewidth=1)
    above.set(ylabel=LOSS_NAMES[loss], title="Uptraining", ylim=(0, None) if "distillation" in loss else None)
    for stage, style in (("original", "--"), ("converted", ":")):
        below.axhline(levels[stage], color=STAGES[stage][0], linestyle=style)
        place = {"transform": below.get_yaxis_transform(), "va": "bottom", "color": STAGES[stage][0]}
        below.text(0.01, levels[stage], f"{stage} {levels[stage]:.3f}", **place)
    steps, values = _series(log, "heldout_loss")
    start, end = 0.0, log[-1]["tokens"] / 1e3
    colour, marker = STAGES["uptrained"]
    below.plot([start, *steps], [levels["converted"], *values], color=colour, marker=marker, markersize=4)
    below.plot([end], [levels["uptrained"]], "*", color=colour, markersize=13)
    note = {"textcoords": "offset points", "xytext": (-4, 9), "ha": "right", "color": colour}
    below.annotate(f"uptrained {levels['uptrained']:.3f}", (end, levels["uptrained"]), **note)
    below.set(xlabel="tokens trained on (thousands)", ylabel="held-out loss\n(nats per token)")
    below.set_title(f"on {text}", fontsize="medium", loc="right")
    below.margins(y=0.1)
    _finish(figure, (above, below), path)


def comparison(scores: Mapping[str, Any], differences: Mapping[str, Any], path: Path) -> None:
    """Draws loss with its interval, and the cache's bytes per token, of each stage side by side.

    Args:
        scores: stage -> its score as in metrics.json.
        differences: stage -> how much it loses above the original, paired by document, as in metrics.json.
        path: where the PNG goes.
    """
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), width_ratios=(3, 2), layout="constrained")
    for place, (stage, score) in enumerate(scores.items()):
        colour, marker = STAGES[stage]
        reach = [[score["nats"] - score["low"]], [score["high"] - score["nats"]]]
        left.errorbar([place], [score["nats"]], yerr=reach, color=colour, marker=marker, markersize=9, capsize=6)
        note = {"textcoords": "offset points", "xytext": (10, 4)}
        left.annotate(f"{score['nats']:.3f}", (place, score["nats"]), color=colour, **note)
        bar = right.bar([place], [score["cache_bytes_per_token"]], color=colour, width=0.6)
        right.bar_label(bar, fmt="{:,.0f}", padding=2)
    above = (_above(differences.get(stage)) for stage in scores)
    left.set_xticks(range(len(scores)), [f"{stage}\n{text}" for stage, text in zip(scores, above, strict=True)])
    left.set(ylabel="held-out loss (nats per token), 95 % interval", title="Loss: lower is better", xlim=(-0.5, 2.6))
    right.set_xticks(range(len(scores)), list(scores))
    right.set(ylabel="cache (bytes per token)", title="Memory while generating")
    right.margins(y=0.12)
    _finish(figure, (left, right), path)


def _above(found: Mapping[str, float] | None) -> str:
    """The paired difference in words: the plain intervals overlap because texts differ, not because models do not."""
    if found is None:
        return "reference"
    return f"{found['value']:+.3f} paired\n({found['low']:+.3f} to {found['high']:+.3f})"


def _series(log: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    chosen = [record for record in log if key in record]
    return [record["tokens"] / 1e3 for record in chosen], [record[key] for record in chosen]


def _finish(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for each in axes:
        each.grid(axis="y", alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    import_pyplot().close(figure)
