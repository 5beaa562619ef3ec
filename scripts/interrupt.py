"""Ctrl-C at every line: is the model afterwards what it was before, or what it was to become?

    python scripts/interrupt.py                                  # everything; goes on where it was stopped
    python scripts/interrupt.py --families gpt2 --patches alibi  # some
    python scripts/interrupt.py --new                            # only lines that no pair before has reached
    python scripts/interrupt.py --sample 40                      # 40 places of each, spread evenly: what CI runs
    python scripts/interrupt.py --render                         # the page again, from the table

The work runs once under a tracer. Before each line of the package the process forks: the child raises KeyboardInterrupt
there and looks at what is left, the parent goes on. A line is interrupted the first and the last time that it is
reached (a `with` comes back to its line when it ends), in `revert` every time.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hf_attnpatch as ap
from hf_attnpatch.configs import all_configs
from hf_attnpatch.evaluation.mode import measuring
from hf_attnpatch.probe import brief_inputs, trace

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from patches import CASES, build  # noqa: E402
from snapshot import bits, registries  # noqa: E402
from standing import Standing, forget  # noqa: E402

RESULTS = ROOT / "recipes/results/interruption"
PACKAGE = str(Path(ap.__file__).parent) + os.sep
FAMILIES = {"gpt2": False, "llama": False, "gemma3_text": False, "bloom": False, "bert": True}
PATCHES = (
    *("position_table", "grouped_2_mean", "alibi", "rope_yarn", "rope_yarn_per_request", "rotary", "sinusoidal"),
    *("no_position", "relative_xl", "self_extend", "flash_auto", "recurrence", "attention_sinks", "re_rope"),
    *("no_position_some", "score_temperature", "windowed_sinks", "latent", "latent_small"),
    *("dual_chunk", "jet_long", "grouped_2_principal", "grouped_2_calibrated"),
)
# those of one row are run for every pair before the next row
ACTIONS = (("apply", "revert"), ("plan",), ("patched", "stream", "request", "measuring"), ("verify",))
ONLY = {"stream": ("recurrence",), "request": ("rope_yarn_per_request",), "measuring": ("alibi",)}
ON_A_PATCHED_MODEL = ("revert", "verify", "stream", "request", "measuring")
OUTCOMES = ("before", "after", "damaged")
COLUMNS = ("family", "patch", "action", "lines", "places", "exact", "tried", *OUTCOMES, "seconds", "examples")
PATIENCE = 60  # seconds for a child, which may wait for a lock for ever
# Forking copies a page table: 300 MB of Python's objects in pages of 4 KB take 28 ms of one core here, in 2 MB 9 ms.
LARGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

Place = tuple[Any, int]  # code and number of a line


class Counting:
    """Counts how often each line of the package is reached."""

    def __init__(self) -> None:
        self.visits: Counter[Place] = Counter()

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """Be told of each function that is called."""
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame: Any, event: str, arg: Any) -> Any:
        """Be told of each line, before it runs."""
        if event == "line":
            place = (frame.f_code, frame.f_lineno)
            self.visits[place] += 1
            self.reached(place, self.visits[place])
        return self.line

    def reached(self, place: Place, times: int) -> None:
        """Do what is to be done before a line runs."""

    def run(self, call: Callable[[], Any]) -> None:
        """Call, and be told of every line."""
        sys.settrace(self.trace)
        try:
            call()
        finally:
            sys.settrace(None)


@dataclass
class Injection(Counting):
    """Forks at places, and collects what the children found.

    Attributes:
        last: how often each line will be reached.
        judge: says what has become of the model, in a child.
        always: at every visit of a line, not only the first and the last.
        every: of so many places one is tried.
        known: lines, by file and number, that need no child.
    """

    last: Counter[Place]
    judge: Callable[[], str]
    always: bool = False
    every: int = 1
    known: frozenset[tuple[str, int]] = frozenset()
    places: int = 0
    visits: Counter[Place] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    pipe: int | None = None  # of a child

    @property
    def exact(self) -> int:
        """How many lines were reached as often as foretold, so that their last visit was the last."""
        return sum(self.last[place] == times for place, times in self.visits.items())

    def reached(self, place: Place, times: int) -> None:
        """Raise in a child, go on in the parent."""
        if self.always or times in (1, self.last[place]):
            self.places += 1
            if self.places % self.every == 0 and _named(place) not in self.known and self._is_child(place):
                raise KeyboardInterrupt

    def _is_child(self, place: Place) -> bool:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self.pipe = writing
            signal.alarm(PATIENCE)
            return True
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)
        outcome, _, why = (said or f"damaged: no answer in {PATIENCE} s").partition(": ")
        self.found[outcome] += 1
        if outcome == "damaged":
            self.examples.append("{}:{}, visit {}: {}".format(*_named(place), self.visits[place], why))
        return False

    def run(self, call: Callable[[], Any]) -> None:
        """Call, and fork on the way."""
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in a child would copy every page
        try:
            super().run(call)
        except KeyboardInterrupt as error:  # while the traceback lives, as it does in a notebook
            self._answer(error)
        finally:
            gc.enable()
            gc.unfreeze()
        if self.pipe is not None:  # nobody let the interruption through
            self._say("damaged: the interruption was swallowed")

    def _answer(self, error: KeyboardInterrupt) -> None:
        if self.pipe is None:
            raise error  # from the keyboard
        forget(error)
        try:
            said = self.judge()
        except Exception as problem:  # noqa: BLE001 - whatever it is, the model is damaged
            said = f"damaged: {type(problem).__name__}: {str(problem)[:200]}"
        self._say(said)

    def _say(self, said: str) -> None:
        try:
            os.write(self.pipe or 2, said.encode())
        finally:  # never go on as a second parent
            os._exit(0)


def _named(place: Place) -> tuple[str, int]:
    return place[0].co_filename[len(PACKAGE) :], place[1]


def content(model: Any, inputs: Any) -> dict[str, Any]:
    """What a model is, whatever its objects' identities are."""
    modules = [
        (p, type(m).__qualname__, m.training, [[type(h).__name__ for h in s.values()] for s in _hooks(m)], _plain(m))
        for p, m in model.named_modules()
    ]
    tensors = {name: bits(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    logits = bits(trace(model, inputs).logits)
    kinds = [(type(c).__name__, c._attn_implementation) for c in all_configs(model)]
    text = json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    return {"modules": modules, "tensors": tensors, "config": (kinds, text), "logits": logits}


def _hooks(module: Any) -> tuple[Any, ...]:
    return module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs


def _plain(module: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}


class Subject:
    """One action on one model, and how to judge what is left of it."""

    def __init__(self, action: str, model: Any, patch: Any, inputs: Any, after: Any) -> None:
        self.model, self.inputs, self.again, self.original = model, inputs, None, None
        self.after = after if action == "apply" else None
        if action in ON_A_PATCHED_MODEL:
            self.original = Standing(model) if action == "revert" else None
            report = ap.apply(model, patch)
            self.again = report.revert if action == "revert" else None
        self.call = self.again or _call(action, model, patch, inputs)
        if action not in ("apply", "revert"):
            self.call()  # fills caches
        self.before = Standing(model)

    def judge(self) -> str:
        """In a child: before, after, or damaged and why."""
        where = self.before.difference()
        if where is not None and not self._is_finished():
            return f"damaged: {where} not as before, and not as after"
        if self.again is not None:
            self.again()
            if not self._is_finished():
                return "damaged: going on did not finish"
        return "before" if where is None else "after"

    def _is_finished(self) -> bool:
        if self.original is not None:
            return self.original.difference() is None
        around = self.before.difference_around()
        return around is None and self.after is not None and content(self.model, self.inputs) == self.after


def _call(action: str, model: Any, patch: Any, inputs: Any) -> Callable[[], Any]:
    blocks: dict[str, Callable[[], Any]] = {
        "patched": lambda: ap.patched(model, patch),
        "stream": lambda: ap.stream(model),
        "request": lambda: ap.request(model, 40),
        "measuring": lambda: measuring(model),
    }

    def block() -> None:
        with blocks[action](), torch.no_grad():
            model(**inputs)

    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: ap.apply(model, patch),
        "plan": lambda: ap.plan(model, patch),
        "verify": lambda: ap.verify(model, save=False),
    }
    return calls.get(action, block)


def interrupt(
    family: str,
    name: str,
    actions: list[str],
    sample: int | None = None,
    known: dict[str, set[tuple[str, int]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each action; nothing where the family refuses the patch.

    Args:
        family: one of `FAMILIES`.
        name: of one of the cases.
        actions: what to interrupt.
        sample: places of each, spread evenly; all by default.
        known: lines of each action that are left out; what is reached here is added.
    """
    case = next(case for case in CASES if case.name == name)
    plain = build(family, FAMILIES[family], case)
    inputs = brief_inputs(plain)
    registries()
    model = copy.deepcopy(plain)
    try:  # and the first time learns what later ones know
        if not ap.apply(model, case.patch).changed:
            return
    except ap.AttnPatchError:
        return
    after = content(model, inputs)
    for action in actions:
        start, counts = sum(os.times()[:4]), Counting()
        twin = Subject(action, copy.deepcopy(plain), case.patch, inputs, after)
        counts.run(twin.call)
        subject = Subject(action, copy.deepcopy(plain), case.patch, inputs, after)
        injection = Injection(counts.visits, subject.judge, always=action == "revert")
        if sample is not None:
            places = sum(min(times, 2) for times in counts.visits.values())
            injection.every = max(1, (counts.visits.total() if injection.always else places) // sample)
        injection.known = frozenset((known or {}).get(action, ()))
        injection.run(subject.call)
        if known is not None:
            known.setdefault(action, set()).update(map(_named, injection.visits))
        yield {
            **{"family": family, "patch": name, "action": action, "lines": len(injection.visits)},
            **{"places": injection.places, "exact": injection.exact, "tried": injection.found.total()},
            **{outcome: injection.found[outcome] for outcome in OUTCOMES},
            **{"seconds": round(sum(os.times()[:4]) - start, 1), "examples": " | ".join(injection.examples[:3])},
        }


def page(rows: list[dict[str, str]]) -> str:
    """The README beside the table."""
    total = {key: sum(int(row[key]) for row in rows) for key in ("tried", *OUTCOMES)}
    pairs = len({(row["family"], row["patch"]) for row in rows})
    lines = [
        "# Interruption",
        "",
        f"**{total['damaged']} of {total['tried']} models damaged** by a KeyboardInterrupt before a line of the "
        f"package: {total['before']} are what they were, {total['after']} what they were to become.",
        "",
        "`make interrupt` (`scripts/interrupt.py`). The work runs once; before a line runs, the process forks. The "
        "child raises there and compares the model with what it was (every object, container, field and byte of the "
        "model, its configs and hooks) and with what it was to become, then torch's modes, transformers' tables, the "
        "random state, the handlers of signals, open requests and the lock; `revert` is called again and must finish. "
        "A place is the first or the last visit of a line, in `revert` every visit. Exact are lines that were reached "
        "as often as in a run before, so that the last visit was the last. Where fewer than all places were tried, the "
        "others are lines that a pair above them in the table has reached, so that each line was interrupted there. "
        f"{pairs} pairs of family and patch; families refuse the others. `interruption.csv` has each.",
        "",
        "| action | pairs | lines | exact | places | tried | before | after | damaged |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for action in (action for actions in ACTIONS for action in actions):
        own = [row for row in rows if row["action"] == action]
        reached, exact, places, tried, *found = (
            sum(int(row[key]) for row in own) for key in ("lines", "exact", "places", "tried", *OUTCOMES)
        )
        if own:
            shares = (f"{exact / reached:.1%}", places, f"{tried} ({tried / places:.0%})")
            lines.append(f"| `{action}` | {' | '.join(map(str, (len(own), reached, *shares, *found)))} |")
    return "\n".join(lines) + "\n"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["family"], row["patch"], row["action"]


def _write(rows: dict[Any, dict[str, str]], folder: Path) -> None:
    with (folder / "interruption.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
    (folder / "README.md").write_text(page(list(rows.values())))


def _work(given: argparse.Namespace, rows: dict[Any, dict[str, str]]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield family, patch and actions that are still to be run."""
    whole = {key for key, row in rows.items() if row["tried"] == row["places"] or given.sample or given.new}
    for group in ACTIONS:
        for name in given.patches:
            wanted = [a for a in group if a in given.actions and name in ONLY.get(a, (name,))]
            for family in given.families:
                actions = [action for action in wanted if (family, name, action) not in whole]
                if actions:
                    yield family, name, actions


def main() -> None:
    """Run from the command line."""
    every = [action for actions in ACTIONS for action in actions]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--patches", nargs="+", default=list(PATCHES), choices=[case.name for case in CASES])
    parser.add_argument("--actions", nargs="+", default=every, choices=every)
    parser.add_argument("--sample", type=int, help="places of each action, spread evenly; all by default")
    parser.add_argument("--new", action="store_true", help="leave out lines that a pair before has reached")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--until", help="stop before another pair begins after this time of day, as 06:20")
    given = parser.parse_args()
    if LARGE_PAGES.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **LARGE_PAGES})
    table, console = given.out / "interruption.csv", Console()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = {_key(row): row for row in csv.DictReader(table.open())} if table.exists() else {}
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    known: dict[str, set[tuple[str, int]]] | None = {} if given.new else None
    for family, name, actions in _work(given, rows) if not given.render else ():
        if given.until and time.strftime("%H:%M") >= given.until:
            break
        for row in interrupt(family, name, actions, given.sample, known):
            console.print(*(f"{row[key]}" for key in COLUMNS), highlight=False, soft_wrap=True)
            rows[_key(row)] = {key: str(value) for key, value in row.items()}
            _write(rows, given.out)
    _write(rows, given.out)
    sys.exit(any(int(row["damaged"]) for row in rows.values()))


if __name__ == "__main__":
    main()
