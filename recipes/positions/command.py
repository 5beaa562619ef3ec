"""The command line of a study: runs the cells without a result, then writes tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attnpatch.evaluation import summarise
from hf_attnpatch.plotting import import_pyplot
from recipes.comparison import running
from recipes.comparison.cells import choose
from recipes.comparison.store import Store
from recipes.positions import study
from recipes.positions.study import Study
from recipes.positions.worker import Runner
from recipes.settings import SettingsError

Render = Callable[[Study, Store, Path], None]


def parse(description: str | None, config: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=config, help="a YAML file, see recipes/configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--cells", nargs="+", default=[], metavar="PATTERN", help="names such as 'yarn/*'")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--list", action="store_true", help="only say which cells there are and which are done")
    parser.add_argument("--render", action="store_true", help="only write the tables and figures of what is there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the results go, instead of the configuration's `output`")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/positions"), help="of trainings")
    return parser.parse_args(arguments)


def main(description: str | None, config: str, render: Render) -> None:
    """Runs what is missing of a study and renders what there is.

    Args:
        description: of the command.
        config: the study, unless the command line names another one.
        render: writes the page and figures into a folder.
    """
    chosen = parse(description, config)
    found = study.read(chosen.config, chosen.overrides)
    out = chosen.out or Path(found.output)
    wanted, store = choose(found.cells, chosen.cells), Store(out / "metrics.jsonl")
    import_pyplot()
    if chosen.list:
        for cell in wanted:
            print(f"{'done' if store.has(cell) else '-':5} {cell.name}")
        return
    failed = []
    if not chosen.render:
        runner = Runner(store, chosen.scratch, chosen.threads)
        failed = running.run(runner, wanted, again=chosen.again, said=said)
    render(found, store, out)
    print(f"written: {out / 'README.md'}", flush=True)
    if failed:
        raise SettingsError(f"{len(failed)} cells failed: {', '.join(failed)}")


def said(_: str, row: Mapping[str, Any]) -> str:
    """A finished cell in a line."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    losses = (
        f"{length}: " + (f"{summarise(found['losses'], resamples=1).nats:.4f}" if "losses" in found else "refused")
        for length, found in row["lengths"].items()
    )
    return f"{', '.join(losses)} nats; {row['total_seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU"
