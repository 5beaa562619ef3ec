"""The figures of an uptraining. Colours are Okabe and Ito's, told apart by colour-blind readers; markers differ too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attnpatch.errors import missing_extra

STAGES = {"original": ("#0072B2", "o"), "converted": ("#D55E00", "s"), "uptrained": ("#009E73", "D")}
TRAINING = "#555555"
LOSS_NAMES = {
    "distillation": "KL from the original\n(nats per token)",
    "cross_entropy": "training loss\n(nats per token)",
}


def import_pyplot() -> Any:
    """Imports matplotlib with the backend that needs no screen.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("matplotlib", "plot", "drawing a figure") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def loss_curve(log: Sequence[Mapping[str, float]], scores: Mapping[str, Any], loss: str, path: Path) -> None:
    """Draws the training loss above and the held-out loss below, with the levels before training.

    Args:
        log: records of the loop, in nats per token.
        scores: stage -> its score as in metrics.json.
        loss: name of the training loss in `LOSS_NAMES`.
        path: where the PNG goes.
    """
    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    above.plot(*_series(log, "loss"), color=TRAINING, marker=".", markersize=4, linewidth=1)
    above.set(ylabel=LOSS_NAMES[loss], title="Uptraining", ylim=(0, None) if loss == "distillation" else None)
    for stage, style in (("original", "--"), ("converted", ":")):
        level, colour = scores[stage]["nats"], STAGES[stage][0]
        below.axhline(level, color=colour, linestyle=style, label=f"{stage} {level:.3f}")
    steps, values = _series(log, "heldout_loss")
    if values:
        below.plot(steps, values, color=STAGES["uptrained"][0], marker="D", markersize=4, label="during uptraining")
    last = scores["uptrained"]["nats"]
    end = [log[-1]["tokens"] / 1e3]
    below.plot(end, [last], "*", color=STAGES["uptrained"][0], markersize=13, label=f"uptrained {last:.3f}")
    below.set(xlabel="tokens trained on (thousands)", ylabel="held-out loss\n(nats per token)")
    below.legend()
    _finish(figure, (above, below), path)


def comparison(scores: Mapping[str, Any], path: Path) -> None:
    """Draws loss with its interval, and the cache's bytes per token, of each stage side by side.

    Args:
        scores: stage -> its score as in metrics.json.
        path: where the PNG goes.
    """
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 4), layout="constrained")
    for place, (stage, score) in enumerate(scores.items()):
        colour, marker = STAGES[stage]
        reach = [[score["nats"] - score["low"]], [score["high"] - score["nats"]]]
        left.errorbar([place], [score["nats"]], yerr=reach, color=colour, marker=marker, markersize=9, capsize=6)
        note = {"textcoords": "offset points", "xytext": (10, 4)}
        left.annotate(f"{score['nats']:.3f}", (place, score["nats"]), color=colour, **note)
        bar = right.bar([place], [score["cache_bytes_per_token"]], color=colour, width=0.6)
        right.bar_label(bar, fmt="{:,.0f}", padding=2)
    left.set(ylabel="held-out loss (nats per token), 95 % interval", title="Loss: lower is better", xlim=(-0.5, 2.8))
    right.set(ylabel="cache (bytes per token)", title="Memory while generating")
    right.margins(y=0.12)
    for axes in (left, right):
        axes.set_xticks(range(len(scores)), list(scores))
    _finish(figure, (left, right), path)


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
