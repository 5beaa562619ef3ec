"""How much do ways of sharing key-value heads lose, before and after uptraining? All figures in one command.

    python recipes/results_grouped_query.py                       # everything; hours on two cores
    python recipes/results_grouped_query.py --cells 'embedded/8-2/*' 'smollm2/*'
    python recipes/results_grouped_query.py --render              # tables and figures of what is there
    python recipes/results_grouped_query.py --quick --out /tmp/grouped_query

A cell is one conversion or one uptraining; each runs in a process of its own and is one line of `metrics.jsonl` once it
is finished, so the same command goes on after a stop (an uptraining from its last checkpoint). At the end, and with
`--render`, `README.md` and the figures are written beside it. Run it in the project's root. Several may run into one
folder at once, each with `--cells` of its own, and lines may be appended from another `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch import embedded
from hf_attnpatch.plotting import import_pyplot
from recipes import settings
from recipes.comparison import running
from recipes.comparison.cells import Cell, choose
from recipes.data import DataError, local_files
from recipes.grouped_query import cells, draw, render
from recipes.grouped_query.cells import CORPUS, SMOLLM2
from recipes.grouped_query.runner import Runner
from recipes.grouped_query.store import Store
from recipes.settings import SettingsError

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "recipes/results/grouped_query"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="embedded,smollm2", help="which models; `embedded` leaves SmolLM2 out")
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="names such as 'embedded/8-2/*'")
    parser.add_argument("--text", default=CORPUS, help="to uptrain on: a folder, a file, or embedded/uptrain")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--list", action="store_true", help="only say which cells there are and which are done")
    parser.add_argument("--render", action="store_true", help="only write the tables and figures of what is there")
    parser.add_argument("--quick", action="store_true", help="a few tiny cells: does it work at all?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/grouped_query"), help="of uptraining runs")
    chosen = parser.parse_args(arguments)
    if chosen.quick and chosen.out is None:
        raise SettingsError("--quick: its figures mean nothing; give a folder for them with --out.")
    chosen.models = tuple(chosen.models.split(","))
    unknown = sorted(set(chosen.models) - set(cells.HEADS))
    if unknown:
        raise SettingsError(f"--models: no {', '.join(unknown)}; choose from {', '.join(cells.HEADS)}.")
    chosen.out = chosen.out or OUT
    return chosen


def check(wanted: Sequence[Cell], text: str) -> None:
    """Checks that models and texts exist before anything runs.

    Raises:
        SettingsError: something is missing; says what makes it.
        DataError: the uptraining text is missing.
    """
    import_pyplot()
    if any(cell.spec.get("model") == SMOLLM2 for cell in wanted) and not (Path(SMOLLM2) / "config.json").is_file():
        raise SettingsError(
            f"{SMOLLM2}: not there; run `python scripts/fetch_smollm2.py --out {SMOLLM2}`, or leave the model out with "
            "--models embedded."
        )
    if any(cell.kind == "uptrain" for cell in wanted) and text != "embedded/uptrain":
        if text == CORPUS:
            check_corpus()
        local_files(text)


def check_corpus() -> None:
    """Checks that the corpus is the one that the embedded model was pretrained on.

    Another Python has another standard library, of which near copies of evaluation documents could be in the training
    part: the split goes by digests of whole documents.

    Raises:
        SettingsError: it is not there, or it is another.
    """
    found = Path(CORPUS).with_name("manifest.json")
    if not found.is_file():
        raise SettingsError(
            f"{CORPUS}: not there; run `python scripts/build_corpus.py`, or uptrain on --text embedded/uptrain."
        )
    shipped = json.loads((embedded.path() / "corpus_manifest.json").read_text())
    other = json.loads(found.read_text())
    if shipped["train"] != other["train"] or shipped["heldout"] != other["heldout"]:
        raise SettingsError(
            f"{found}: not the corpus of the embedded model (made with Python {other['python']}, that one with "
            f"{shipped['python']}), so copies of evaluation text may be in it; use --text embedded/uptrain."
        )


def said(runner: Runner, name: str, row: Mapping[str, Any]) -> str:
    """A finished cell in a line."""
    if "scores" in row:
        before, after = (row["differences"][stage]["value"] for stage in ("converted", "uptrained"))
        return f"{before:+.4f}, uptrained {after:+.4f} nats; {row['total_seconds']:.0f} s"
    above, loss = render.excess(runner.store, name), runner.store.score(name)
    assert loss is not None
    return f"{loss.nats:.4f} nats" + (f", {above.value:+.4f}" if above else "") + f"; {row['total_seconds']:.0f} s"


def write(store: Store, chosen: argparse.Namespace, every: Sequence[Cell]) -> None:
    """Writes tables and figures."""
    draw.everything(store, chosen.out)
    render.write(store, every, chosen.out / "README.md")
    print(f"written: {chosen.out / 'README.md'}", flush=True)


def main() -> None:
    """Runs what is missing and writes what there is."""
    chosen = parse()
    every = cells.all_cells(chosen.models, cells.QUICK if chosen.quick else cells.FULL, chosen.text)
    every = cells.quick_cells(every) if chosen.quick else every
    wanted = choose(every, chosen.cells)
    store = Store(chosen.out / "metrics.jsonl")
    runner = Runner(store, chosen.scratch, chosen.threads)
    if chosen.list:
        for cell in wanted:
            print(f"{'done' if store.has(runner.ready(cell)) else '-':5} {cell.name}")
        return
    failed = []
    if not chosen.render:
        check(wanted, chosen.text)
        failed = running.run(runner, wanted, again=chosen.again, said=partial(said, runner))
    write(store, chosen, every)
    if failed:
        raise SystemExit(f"results_grouped_query: {len(failed)} cells failed: {', '.join(failed)}")


if __name__ == "__main__":
    settings.clearly(main, SettingsError, DataError)
