"""Whether the tests notice: each module of `mutation.yaml` with one small change at a time, before its own tests.

make mutation                                         # every module
python scripts/mutation.py functional/tables.py       # one
python scripts/mutation.py plan.py --more 20          # twenty beyond those that were drawn before
python scripts/mutation.py --survivors                # again only what was not killed, after tests were added
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import mutants
import mutation_page as page
import mutation_worker as worker
import yaml

CONFIG = Path(__file__).with_suffix(".yaml")
RESULTS = worker.ROOT / "recipes" / "results" / "mutation"


def main() -> None:
    """Run what was asked for; what is written is whole after every module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="paths inside hf_attnpatch; none: all of the config")
    parser.add_argument("--survivors", action="store_true", help="only mutants that were not killed when last run")
    parser.add_argument("--tree", type=Path, default=worker.ROOT, help="another checkout, such as the one before")
    parser.add_argument("--sample", type=int, help="mutants of each module, in the place of the config's numbers")
    parser.add_argument("--more", type=int, default=0, help="so many mutants beyond those drawn before, and no others")
    parser.add_argument("--list", action="store_true", help="count mutants and run nothing")
    args = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    worker.enter(args.tree)
    shared: dict[tuple[str, ...], list[tuple[str, dict]]] = {}
    for name in args.modules or config["modules"]:
        own = {**config["defaults"], **config["modules"][name], "seed": config["seed"]}
        own |= {"sample": args.sample} if args.sample else {}
        tests = tuple(test for test in own["tests"] if Path(test.partition("::")[0]).exists())
        shared.setdefault(tests, []).append((name, own))
        if args.list:
            print(name, len(mutants.mutants(Path("hf_attnpatch", name).read_text("utf-8"))))
    for tests, modules in shared.items() if not args.list else ():

        def work(room: worker.Room, modules: list[tuple[str, dict]] = modules) -> None:
            for name, own in modules:
                run(name, own, room, args.survivors, args.more)

        worker.session(tests, work)


def run(name: str, own: dict, room: worker.Room, survivors: bool, more: int) -> None:
    """One module with each mutant before its tests, then the files of results."""
    started = time.monotonic()
    path = Path.cwd() / "hf_attnpatch" / name
    everything = mutants.mutants(path.read_text("utf-8"))
    before = page.read(RESULTS)[0].get(name) if more else None
    drawn = mutants.sample(everything, before.run + more if before else own["sample"], own["seed"])
    if before:
        old = {one.key for one in mutants.sample(everything, before.run, own["seed"])}
        drawn = [one for one in drawn if one.key not in old]
    if survivors:
        left = [row for row in page.read(RESULTS)[1].values() if row.module == name and row.now in page.ALIVE]
        drawn = [one for one in everything if one.key in {row.key[1:] for row in left}]
    found: dict[tuple[str, ...], page.Row] = {}
    outcomes: Counter[str] = Counter()
    for one in drawn:
        why = _reason(one, own)
        result = "survived" if why and survivors else _outcome(name, path, one, room, own)
        why = why if result == "survived" else ""
        outcomes["equivalent" if why else result] += 1
        row = page.Row(name, *one.key, one.operator, one.lines[0], result, "equivalent" if why else result, why)
        found[row.key] = row
        if result != "killed" and not why:
            print(f"{result:12}{name}:{one.lines[0]} {one.function} [{one.operator}]\n    - {one.old}\n    + {one.new}")
    seconds = round(time.monotonic() - started)
    modules, rows = page.read(RESULTS)  # now: another module may have been written meanwhile
    if name not in modules or before:
        alive = outcomes["survived"] + outcomes["equivalent"]
        counts = (len(drawn), outcomes["killed"], alive, outcomes["timeout"], outcomes["not covered"], seconds)
        modules[name] = page.Module(name, len(everything), *counts).beside(before)
    _merge(rows, found, name, survivors or bool(before))
    page.write(RESULTS, modules, rows)
    print(f"{name}: {len(drawn)} of {len(everything)} in {seconds} s, {dict(outcomes)}", flush=True)


def _reason(one: mutants.Mutant, own: dict) -> str:
    """Why no test could see it, of the config's entries: a function, and what the new lines contain."""
    entries = (e for e in own.get("equivalent", ()) if e["in"] == one.function and e["new"] in one.new)
    return next((e["why"] for e in entries), "")


def _outcome(name: str, path: Path, one: mutants.Mutant, room: worker.Room, own: dict) -> str:
    chosen = room.baseline.tests(path, one.lines)
    limit = own["patience"] + 4 * sum(room.baseline.seconds[test] for test in chosen)
    module = "hf_attnpatch." + name.removesuffix(".py").replace("/", ".")
    return room.outcome(module, path, one.source, chosen, limit)


def _merge(rows: dict, found: dict, name: str, survivors: bool) -> None:
    """Keep what a mutant did first; drop those that were killed both times; mark those whose code is gone."""
    for key, row in found.items():
        if key in rows:
            row.first = rows[key].first
        if row.first != "killed" or row.now != "killed":
            rows[key] = row
    for key, row in rows.items():
        if row.module == name and key not in found and (not survivors or row.now in page.ALIVE):
            row.now = "gone"


if __name__ == "__main__":
    main()
