"""The figures of the comparison. Colours are Okabe and Ito's; markers differ too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_attnpatch.embedded import DOMAINS
from recipes.comparison.figures import finish, panels, plain, save
from recipes.grouped_query.cells import HEADS, STARTS
from recipes.grouped_query.render import METHODS, caption, excess, ratio
from recipes.grouped_query.store import Store

OURS, OTHERS = ("#0072B2", "o"), ("#777777", "s")
START = {
    "refined": ("#0072B2", "o"),
    "calibrated": ("#56B4E9", "^"),
    "procrustes": ("#009E73", "D"),
    "mean": ("#D55E00", "s"),
    "first": ("#777777", "v"),
}
PLACE = {"mean": ("#D55E00", "s"), "procrustes": ("#009E73", "D")}
GOAL = {4: 0.02, 1: 0.06}  # nats above the original after uptraining


def everything(store: Store, folder: Path) -> None:
    """Draws what there is results for."""
    for name, draw in (("zero_shot.png", zero_shot), ("uptraining.png", uptraining), ("domains.png", domains)):
        figure = draw(store)
        if figure is not None:
            save(figure, folder / name)


def zero_shot(store: Store) -> Any:
    """Excess loss of each method, a panel for each number of heads; None where nothing was measured."""
    places = [(model, kv) for model, (_, counts) in HEADS.items() for kv in counts]
    shown = [(model, kv, _methods(store, model, kv)) for model, kv in places]
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        return None
    figure, axes = panels(len(shown), width=4.2, height=3.4, sharey=False)
    for axis, (model, kv, found) in zip(axes, shown, strict=True):
        names = list(found)
        for method, interval in found.items():
            at, (colour, marker) = names.index(method), OURS if method in METHODS[4:] else OTHERS
            reach = [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]
            axis.errorbar([interval.value], [at], xerr=reach, fmt=marker, color=colour, capsize=4)
            note = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center", "fontsize": 8, "color": colour}
            axis.annotate(f"{interval.value:.3f}", (interval.value, at), **note)
        axis.set_yticks(range(len(names)), [caption(name) for name in names])
        axis.set(xscale="log", ylim=(len(names) - 0.5, -0.7), xlabel="nats above the original")
        axis.margins(x=0.15)
        plain(axis.xaxis)
        title = "embedded" if model == "embedded" else "SmolLM2-135M"
        axis.set_title(f"{title}, {HEADS[model][0]} to {kv}")
    finish(figure, axes, "x", "Conversion without training (round: this package's methods)")
    return figure


def _methods(store: Store, model: str, kv: int) -> dict[str, Any]:
    found = {m: excess(store, f"{model}/{HEADS[model][0]}-{kv}/{m}") for m in METHODS}
    return {method: interval for method, interval in found.items() if interval is not None and interval.value > 0}


def uptraining(store: Store) -> Any:
    """Excess loss against uptraining tokens, a panel for each number of heads."""
    places = [(8, kv) for kv in HEADS["embedded"][1]] + [(3, 1)]
    rows = {(*place, s): store.get("uptraining/{}-{}/{}".format(*place, s)) for place in places for s in STARTS}
    there = [(present, kv) for present, kv in places if any(rows[present, kv, s] for s in STARTS)]
    if not there:
        return None
    figure, axes = panels(len(there), width=4.2, height=3.6, sharey=True)
    ends = []
    for axis, (present, kv) in zip(axes, there, strict=True):
        found = [(start, rows[present, kv, start]) for start in STARTS]
        ends.append([_curve(axis, row, start) for start, row in found if row is not None])
        if present == 8 and kv in GOAL:
            axis.axhline(GOAL[kv], color="#555555", linestyle="--", linewidth=1)
            axis.text(
                0.02, GOAL[kv], f"target {GOAL[kv]}", transform=axis.get_yaxis_transform(), va="bottom", fontsize=8
            )
        axis.set(
            yscale="log",
            xlabel="tokens (thousands)",
            title=f"{'SmolLM2' if present == 3 else 'embedded'}, {present} to {kv}",
        )
        plain(axis.yaxis)
    axes[0].set_ylabel("nats above the original")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STARTS))
    finish(figure, axes, "y", "Uptrained by distillation from the unconverted self (attention only)")
    figure.draw_without_rendering()  # limits are settled only then
    for axis, values in zip(axes, ends, strict=True):
        _label(axis, values)
    return figure


def _curve(axis: Any, row: Any, start: str) -> tuple[float, float, str]:
    """Draws one; returns where it ends, what stands there and its colour."""
    original, (colour, marker) = row["scores"]["original"]["nats"], START[start]
    tokens = [0.0, *(point["tokens"] / 1e3 for point in row["curve"])]
    above = [row["differences"]["converted"]["value"], *(p["heldout_loss"] - original for p in row["curve"])]
    axis.plot(tokens, above, marker=marker, markersize=4, color=colour, label=f"from {start}")
    return max(above[-1], 1e-3), row["differences"]["uptrained"]["value"], colour


def _label(axis: Any, ends: list[tuple[float, float, str]], apart: float = 0.055) -> None:
    """Writes the last value of each curve beside the panel, none over another."""
    place = -1.0
    for end, value, colour in sorted(ends):
        at = axis.transAxes.inverted().transform(axis.transData.transform((0.0, end)))[1]
        place = max(at, place + apart)
        axis.text(1.02, place, f"{value:+.3f}", transform=axis.transAxes, color=colour, va="center", fontsize=8)


def domains(store: Store) -> Any:
    """Ratios of refined's damage, calibrated on one domain, in that domain and in the others."""
    counts = [kv for kv in HEADS["embedded"][1] if any(store.get(f"embedded/8-{kv}/refined/on-{d}") for d in DOMAINS)]
    if not counts:
        return None
    figure, axes = panels(len(counts), width=3.8, height=3.4, sharey=True)
    for axis, kv in zip(axes, counts, strict=True):
        place = f"embedded/8-{kv}"
        for shift, (worse, (colour, marker)) in zip((-0.08, 0.08), PLACE.items(), strict=True):
            for at, domain in enumerate(DOMAINS):
                others = [each for each in DOMAINS if each != domain]
                for step, where, fill in ((-0.16, [domain], "full"), (0.16, others, "none")):
                    found = ratio(store, f"{place}/refined/on-{domain}", f"{place}/{worse}", where)
                    if found is not None:
                        reach = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
                        style = {"fmt": marker, "color": colour, "capsize": 3, "fillstyle": fill, "markersize": 6}
                        first = at == 0 and axis is axes[0]
                        label = f"of {worse}, {'same domain' if fill == 'full' else 'the other two'}" if first else None
                        axis.errorbar([at + step + shift], [found.value], yerr=reach, label=label, **style)
        axis.set_xticks(range(len(DOMAINS)), [f"{domain}" for domain in DOMAINS])
        axis.set(title=f"8 to {kv}", xlabel="calibrated on", xlim=(-0.6, len(DOMAINS) - 0.4))
    axes[0].set_ylim(bottom=0)  # shared, and only once all is drawn: setting it keeps the top where it is
    axes[0].set_ylabel("damage of refined, as a share")
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=4 if len(counts) > 1 else 2, fontsize=8)
    finish(figure, axes, "y", "Does a calibration hold on text of other domains?")
    return figure
