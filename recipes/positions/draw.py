"""Figures of both studies. Colours are Okabe and Ito's, with a marker and a line style each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.comparison.figures import finish, panels, save
from recipes.comparison.store import Store
from recipes.positions.page import TRAINED, score

# the same colour for a method in all studies; other methods take what is left
OWN = {
    **{
        "original": "#000000",
        "yarn": "#0072B2",
        "self_extend": "#D55E00",
        "re_rope": "#009E73",
        "dual_chunk": "#CC79A7",
    },
    **{"jet_long": "#E69F00", "ntk": "#56B4E9", "attention_sinks": "#777777"},
    **{"alibi": "#D55E00", "relative": "#009E73", "none": "#CC79A7", "rotary": "#0072B2"},
}
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
Groups = Mapping[str, Sequence[str]]  # panel -> cells
MARKERS = "osD^vP*X<>hdp8H"
LINES = ("-", "--", ":", "-.")


def styles(groups: Groups) -> dict[str, dict[str, Any]]:
    """A line for each cell, the same one in all figures: a colour for what was patched, lines for its trainings."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    trained = [name.partition(TRAINED)[0] for name in names if TRAINED in name]  # first, to have colours of their own
    bases = list(dict.fromkeys([*trained, *(name.partition(TRAINED)[0] for name in names)]))
    found = {}
    for name in names:
        number = bases.index(name.partition(TRAINED)[0])
        variant = [each for each in names if each.partition(TRAINED)[0] == bases[number]].index(name)
        found[name] = {
            "color": OWN.get(bases[number].rpartition("/")[2], COLOURS[number % len(COLOURS)]),
            "marker": MARKERS[(number + 3 * variant) % len(MARKERS)],
            "linestyle": LINES[(number // len(COLOURS) + variant) % len(LINES)],
            "markersize": 5,
            "linewidth": 1.3,
            "clip_on": False,
        }
    return found


def label(name: str) -> str:
    """A cell's name in a legend."""
    return name.replace(TRAINED, ", trained")


def by_length(
    store: Store, groups: Groups, lengths: Sequence[int], path: Path, title: str, *, above: float | None = None
) -> None:
    """Loss of the same targets against context, a panel for each group of cells; no file where nothing is measured.

    Args:
        store: the results.
        groups: panel -> cells.
        lengths: tokens of context.
        path: where the PNG goes.
        title: above the figure.
        above: a loss to draw the differences from, small and large ones to be told apart; None draws the losses.
    """
    lines, found = styles(groups), {group: _measured(store, names, lengths) for group, names in groups.items()}
    found = {group: each for group, each in found.items() if each}
    if not found:
        return
    figure, axes = panels(len(found), width=4.6, height=4.4, sharey=False)
    for axis, (group, cells) in zip(axes, found.items(), strict=True):
        for name, pairs in cells.items():
            axis.plot(
                [n for n, _ in pairs], [nats - (above or 0) for _, nats in pairs], label=label(name), **lines[name]
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.set(xlabel="tokens of context", ylabel="nats per token, same targets", title=group)
        if above is not None:
            _differences(axis, lengths[0])
        _legend(axis)
    _save(figure, axes, title, path)


def _measured(store: Store, names: Sequence[str], lengths: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    found = {name: [(n, score(store, name, n)) for n in lengths] for name in names}
    kept = {name: [(n, each.nats) for n, each in pairs if each is not None] for name, pairs in found.items()}
    return {name: pairs for name, pairs in kept.items() if pairs}


def by_position(store: Store, groups: Groups, mark: tuple[int, str], path: Path, title: str) -> None:
    """Loss against position in one pass of the longest length; a dotted line marks a position, with what it is."""
    lines, found = (
        styles(groups),
        {group: [n for n in names if (store.get(n) or {}).get("positions")] for group, names in groups.items()},
    )
    found = {group: names for group, names in found.items() if names}
    if not found:
        return
    figure, axes = panels(len(found), width=4.6, height=4.4, sharey=False)
    for axis, (group, names) in zip(axes, found.items(), strict=True):
        for name in names:
            rows = store.rows[name]["positions"]
            middle = [(a + b) / 2 for a, b in zip(rows["edges"], rows["edges"][1:], strict=False)]
            axis.plot(middle, rows["nats"], label=label(name), **lines[name])
        axis.axvline(mark[0], color="#555555", linewidth=1, linestyle=":")
        axis.set(xlabel=f"position (dotted: {mark[1]}, {mark[0]:,})", ylabel="nats per token", title=group)
        _legend(axis)
    _save(figure, axes, title, path)


def curves(store: Store, groups: Groups, path: Path, title: str) -> None:
    """Training losses against tokens."""
    lines, found = (
        styles(groups),
        {group: [n for n in names if (store.get(n) or {}).get("training")] for group, names in groups.items()},
    )
    found = {group: names for group, names in found.items() if names}
    if not found:
        return
    figure, axes = panels(len(found), width=4.6, height=4.0, sharey=False)
    for axis, (group, names) in zip(axes, found.items(), strict=True):
        for name in names:
            pairs = store.rows[name]["training"]["curve"]
            axis.plot([n / 1e3 for n, _ in pairs], [v for _, v in pairs], label=label(name), **lines[name])
        axis.set(xlabel="tokens trained on (thousands)", ylabel="training loss (nats per token)", title=group)
        _legend(axis)
    _save(figure, axes, title, path)


def _differences(axis: Any, trained: int) -> None:
    """An axis that shows hundredths around 0 as well as whole nats."""
    axis.set_yscale("symlog", linthresh=0.1)
    ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    low, high = axis.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(shown, [f"{tick:+g}" if tick else "0" for tick in shown])
    axis.set_yticks([], minor=True)
    axis.set_ylabel(f"nats above the unpatched model at {trained}, same targets")


def _legend(axis: Any) -> None:
    """Beside the panel where it would cover it."""
    many = len(axis.get_legend_handles_labels()[0]) > 7
    axis.legend(fontsize=7, **({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}))


def _save(figure: Any, axes: Sequence[Any], title: str, path: Path) -> None:
    finish(figure, axes, "both", title)
    save(figure, path)
