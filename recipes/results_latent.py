"""Latent attention beside shared heads at the same bytes: what does each lose, with nothing trained end to end?

    python recipes/results_latent.py               # the embedded model; minutes of two cores for each cell
    python recipes/results_latent.py --cells 'embedded/8-2/*'
    python recipes/results_latent.py --render      # the table and the figure of what is there

A cell is one conversion, measured in a process of its own on the text, the calibration and the documents of
`results_grouped_query.py`, whose lines this one reads for the original and for shared heads. The bytes of a cache are
measured, and hold everything: the constant channel, and the one rank and rotary width of all layers. `README.md` and
the figure are written beside `metrics.jsonl`. Run it in the project's root.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.evaluation import Interval, difference
from recipes import settings
from recipes.comparison import running
from recipes.comparison.cells import Cell, choose
from recipes.comparison.figures import finish, panels, save
from recipes.comparison.tables import conditions, markdown, write_page
from recipes.data import DataError
from recipes.grouped_query.ratios import damage_ratio
from recipes.grouped_query.render import share, signed
from recipes.grouped_query.runner import Runner
from recipes.grouped_query.store import Store
from recipes.settings import SettingsError

RESULTS = Path(__file__).resolve().parent / "results"
OUT, GROUPED = RESULTS / "latent", RESULTS / "grouped_query/metrics.jsonl"
ORIGINAL = "embedded/original"
PLACES = {"8-2": 0.25, "8-1": 0.125}  # heads whose bytes are taken, share of the cache
METHODS = ("refined", "calibrated", "principal")
WANTED = 0.5  # of the damage of shared heads, refined


def cells(grouped: Store, steps: int) -> list[Cell]:
    """The conversions, each on what shared heads of the same bytes were measured on.

    Raises:
        SettingsError: those were not measured.
    """
    found = []
    for place, target in PLACES.items():
        row = grouped.get(f"embedded/{place}/refined")
        if row is None:
            raise SettingsError(
                f"{grouped.path}: no embedded/{place}/refined; run recipes/results_grouped_query.py first."
            )
        for method in METHODS:
            patch = {"patch": "latent", "cache_target": target, "method": method}
            patch |= {"refine_steps": steps} if method == "refined" else {}
            text = None if method == "principal" else row["spec"]["calibration"]
            spec = {**row["spec"], "patch": patch, "calibration": text}
            found.append(Cell(f"embedded/{place}/{method}", "convert", spec))
    return sorted(found, key=lambda cell: METHODS.index(cell.name.rpartition("/")[2]))


def excess(grouped: Store, store: Store, name: str) -> Interval | None:
    """How much a conversion loses above the original, paired by document; None where it was not measured."""
    before, after = grouped.score(ORIGINAL), store.score(name)
    return None if before is None or after is None else difference(before, after)


def of_shared(grouped: Store, store: Store, name: str) -> Interval | None:
    """The damage of a latent over that of shared heads, refined, at the same bytes."""
    place = name.split("/")[1]
    before, other, found = grouped.score(ORIGINAL), grouped.score(f"embedded/{place}/refined"), store.score(name)
    return None if before is None or other is None or found is None else damage_ratio(before, found, other)


def write(grouped: Store, store: Store, every: Sequence[Cell], folder: Path) -> None:
    """Writes the table and the figure of what there is."""
    figure = _figure(grouped, store, every)
    if figure is not None:
        save(figure, folder / "excess.png")
    write_page(folder / "README.md", _page(grouped, store, every, "" if figure is None else "excess.png"))


def _page(grouped: Store, store: Store, every: Sequence[Cell], drawn: str) -> list[str]:
    head = (
        "bytes of",
        "what",
        "bytes a token",
        "excess nats",
        "of shared, refined",
        "rank + rotary",
        "CPU s",
        "peak MB",
    )
    rows = [row for place in PLACES for row in _rows(grouped, store, every, place)]
    missing = [cell.name for cell in every if store.get(cell.name) is None]
    return [
        "# Latent attention: what it loses",
        _finding(grouped, store),
        "* `python recipes/results_latent.py` measures this; `metrics.jsonl` has every figure, a line for each cell.\n"
        "* Documents, calibration text and refinement steps are those of [shared heads](../grouped_query/README.md); "
        "so are the figures of the original and of shared heads, which are not measured again.\n"
        "* `excess`: nats per token above the original, with 95 % intervals over documents, paired. Bytes are measured "
        "on a cache, and hold the constant channel; one rank and one rotary width serve all layers.",
        markdown(head, rows),
        f"![excess loss by bytes]({drawn})" if drawn else "",
        *([f"Not measured yet: {', '.join(missing)}."] if missing else []),
        conditions(store),
    ]


def _rows(grouped: Store, store: Store, every: Sequence[Cell], place: str) -> list[list[str]]:
    other = f"embedded/{place}/refined"
    shared = grouped.rows[other]
    took = shared["conversion"]
    rows = [
        [
            place,
            "shared heads, refined",
            f"{shared['cache_bytes_per_token']:.0f}",
            signed(excess(grouped, grouped, other)),
        ]
        + ["1", "", f"{took['cpu_seconds']:.0f}", f"{took['peak_mb']:.0f}"]
    ]
    for cell in every:
        row = store.get(cell.name)
        if row is not None and cell.name.split("/")[1] == place:
            took, method = row["conversion"], cell.name.rpartition("/")[2]
            shape = took["damage"]["layers"][0]["latent"].replace("rank ", "").replace(", rotary", " +")
            found = signed(excess(grouped, store, cell.name))
            rows.append(
                [place, f"latent, {method}", f"{row['cache_bytes_per_token']:.0f}", found]
                + [share(of_shared(grouped, store, cell.name)), shape]
                + [f"{took['cpu_seconds']:.0f}", f"{took['peak_mb']:.0f}"]
            )
    return rows


def _finding(grouped: Store, store: Store) -> str:
    said = []
    for place, target in PLACES.items():
        name = f"embedded/{place}/refined"
        found, ratio = excess(grouped, store, name), of_shared(grouped, store, name)
        if found is not None and ratio is not None:
            met = "as was aimed at" if ratio.value <= WANTED else f"the aim was {WANTED:g}"
            said.append(
                f"at {target:g} of the cache a latent, refined, loses {found.value:.3f} nats per token: "
                f"{ratio.value:.2f} of what shared heads lose at the same bytes ({met})"
            )
    return f"**{'; '.join(said).capitalize()}.**" if said else "Nothing was measured yet."


def _figure(grouped: Store, store: Store, every: Sequence[Cell]) -> Any:
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for place in PLACES:
        other = f"embedded/{place}/refined"
        bytes_ = grouped.rows[other]["cache_bytes_per_token"]
        shared = excess(grouped, grouped, other)
        assert shared is not None
        lines.setdefault("shared heads, refined", []).append((bytes_, shared))
        for cell in every:
            found = excess(grouped, store, cell.name) if cell.name.split("/")[1] == place else None
            if found is not None:
                lines.setdefault(f"latent, {cell.name.rpartition('/')[2]}", []).append((bytes_, found))
    if len(lines) < 2:
        return None
    figure, (axis,) = panels(1, width=6.0, height=3.6, sharey=False)
    marks = zip(lines.items(), ("#999999", "#0072B2", "#D55E00", "#009E73"), "so^v", strict=False)
    for (label, points), colour, marker in marks:
        at, found = [p[0] for p in points], [p[1] for p in points]
        reach = [[max(0.0, f.value - f.low) for f in found], [max(0.0, f.high - f.value) for f in found]]
        axis.errorbar(at, [f.value for f in found], yerr=reach, fmt=f"{marker}-", color=colour, capsize=4, label=label)
    axis.set(xlabel="bytes of cache a token (fp32)", ylabel="nats above the original", ylim=(0, None))
    axis.legend()
    finish(figure, [axis], "y", "Embedded model, nothing trained end to end")
    return figure


def said(grouped: Store, store: Store, name: str, row: Mapping[str, Any]) -> str:
    """A finished cell in a line."""
    return f"{signed(excess(grouped, store, name))} nats; {row['total_seconds']:.0f} s"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="names such as 'embedded/8-2/*'")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--render", action="store_true", help="only write the table and the figure of what is there")
    parser.add_argument("--steps", type=int, default=150, help="of refinement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs what is missing and writes what there is."""
    chosen = parse()
    grouped, store = Store(GROUPED), Store(chosen.out / "metrics.jsonl")
    every = cells(grouped, chosen.steps)
    failed = []
    if not chosen.render:
        runner = Runner(store, chosen.out, chosen.threads)
        wanted = choose(every, chosen.cells)
        failed = running.run(runner, wanted, again=chosen.again, said=partial(said, grouped, store))
    write(grouped, store, every, chosen.out)
    if failed:
        raise SystemExit(f"results_latent: {len(failed)} cells failed: {', '.join(failed)}")


if __name__ == "__main__":
    settings.clearly(main, SettingsError, DataError)
