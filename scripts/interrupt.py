"""Ctrl-C at every line: is the model afterwards what it was before, or what it was to become?

    python scripts/interrupt.py                                  # everything; goes on where it was stopped
    python scripts/interrupt.py --families gpt2 --patches alibi  # some
    python scripts/interrupt.py --by line                        # every line once, by whichever way it is reached first
    python scripts/interrupt.py --sample 40                      # 40 places of each, spread evenly: what CI runs
    python scripts/interrupt.py --render                         # the page again, from the table

The work runs once under a tracer. Before each line of the package's writing modules the process forks: the child raises
KeyboardInterrupt there and looks at what is left, the parent goes on. A line is visited once for each way (of functions
of the package) by which it is reached, since loops repeat themselves; where they write, or put back, at the first, the
second, the fourth ... time.

Modules that only read a model raise into a line of one that writes, where an interruption comes as well.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hf_attnpatch as ap
from hf_attnpatch.configs import all_configs
from hf_attnpatch.exclusive import lock_of
from hf_attnpatch.probe import brief_inputs, trace

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from patches import CASES, build  # noqa: E402
from snapshot import bits, registries, snapshot  # noqa: E402

RESULTS = ROOT / "recipes/results/interruption"
PACKAGE = str(Path(ap.__file__).parent) + os.sep
READING = ("functional/", "anatomy.py", "layouts.py", "sites.py", "upstream/", "record.py", "errors.py", "foreign.py")
LOOPS = ("api.py", "edit.py", "edits.py", "interruption.py", "probe.py", "report.py")
FAMILIES = {"gpt2": False, "llama": False, "gemma3_text": False, "bloom": False, "bert": True}
PATCHES = (
    *("position_table", "grouped_2_mean", "alibi", "rope_yarn", "rope_yarn_per_request", "rotary", "sinusoidal"),
    *("no_position", "relative_xl", "self_extend", "flash_auto", "recurrence", "attention_sinks", "re_rope"),
    *("dual_chunk", "jet_long", "grouped_2_principal", "grouped_2_calibrated"),
)
ACTIONS = ("apply", "revert", "plan", "patched", "verify")
COLUMNS = (
    "family",
    "patch",
    "action",
    "by",
    "lines",
    "places",
    "tried",
    "before",
    "after",
    "damaged",
    "seconds",
    "examples",
)
OUTCOMES = ("before", "after", "damaged")
PATIENCE = 60  # seconds for a child, which may wait for a lock for ever


@dataclass
class Injection:
    """Forks at places, and collects what the children found.

    Attributes:
        every: of so many places one is tried.
        judge: says what has become of the model, in a child.
        by: "way": a line is another place for each way of functions that leads to it; or "line".
    """

    every: int
    judge: Callable[[], str]
    by: str = "way"
    lines: int = 0
    places: int = 0
    visits: Counter[Any] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    pipe: int | None = None  # of a child

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """Be told of each function that is called."""
        name = frame.f_code.co_filename
        writes = name.startswith(PACKAGE) and not name[len(PACKAGE) :].startswith(READING)
        return self.line if writes else None

    def line(self, frame: Any, event: str, arg: Any) -> Any:
        """Be told of each line, before it runs."""
        if event != "line":
            return self.line
        self.lines += 1
        place = _place(frame, self.by)
        self.visits[place] += 1
        times, loops = self.visits[place], frame.f_code.co_filename[len(PACKAGE) :] in LOOPS
        if times == 1 or (loops and times & (times - 1) == 0):
            self.places += 1
            if self.places % self.every == 0 and self._child(frame):
                raise KeyboardInterrupt
        return self.line

    def _child(self, frame: Any) -> bool:
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
            self.examples.append(f"{frame.f_code.co_filename[len(PACKAGE) :]}:{frame.f_lineno} {why}")
        return False

    def run(self, call: Callable[[], Any]) -> None:
        """Call, and fork on the way."""
        sys.settrace(self.trace)
        try:
            call()
        except KeyboardInterrupt:
            self._answer()  # while the traceback lives, as it does in a notebook
        finally:
            sys.settrace(None)
        if self.pipe is not None:  # nobody let the interruption through
            os.write(self.pipe, b"damaged: the interruption was swallowed")
            os._exit(0)

    def _answer(self) -> None:
        if self.pipe is None:
            raise  # noqa: PLE0704 - from the keyboard
        try:
            said = self.judge()
        except Exception as error:  # noqa: BLE001 - whatever it is, the model is damaged
            said = f"damaged: {type(error).__name__}: {str(error)[:200]}"
        try:
            os.write(self.pipe, said.encode())
        finally:  # never go on as a second parent
            os._exit(0)


def _place(frame: Any, by: str) -> Any:
    way, above = [], frame.f_back if by == "way" else None
    while above is not None:
        if above.f_code.co_filename.startswith(PACKAGE):
            way.append(above.f_code)
        above = above.f_back
    return frame.f_code, frame.f_lineno, tuple(way)


def modes() -> dict[str, Any]:
    """What torch and Python are in, which a model does not hold."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": bits(torch.get_rng_state()),
        "signals": signal.getsignal(signal.SIGINT),
    }


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


def _difference(wanted: Any, found: Any) -> str:
    return next((f"{key}" for key in wanted if wanted[key] != found[key]), "nothing")


@dataclass
class Subject:
    """One action on one model, and how to judge what is left of it."""

    model: Any
    call: Callable[[], Any]
    before: Any
    after: Any  # content of the model once it is done; None where that is as before
    inputs: Any
    again: Callable[[], Any] | None = None  # what must lead to `after` once more

    def judge(self) -> str:
        """In a child: before, after, or damaged and why."""
        wanted, found = self.before["modes"], modes()
        if found != wanted:
            return f"damaged: {_difference(wanted, found)} of the process"
        now = snapshot(self.model)
        outcome, other = "before", "nothing"
        if now != self.before["snapshot"]:
            said = content(self.model, self.inputs)
            if self.after is None or said != self.after:
                where = _difference(self.before["snapshot"], now)
                other = "-" if self.after is None else _difference(self.after, said)
                return f"damaged: {where} not as before, {other} not as after"
            outcome = "after"
        if outcome == "before" and content(self.model, self.inputs) != self.before["content"]:
            return "damaged: content"
        if self.again is not None:
            self.again()
            if content(self.model, self.inputs) != self.after:
                return "damaged: going on did not finish"
        return outcome if _free(self.model) else "damaged: its lock is held"


def _free(model: Any) -> bool:
    """Whether another thread may patch the model, once the traceback is gone that may hold on to it."""
    free: list[bool] = []
    sys.exc_info()
    error = sys.exc_info()[1]
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    thread = threading.Thread(target=lambda: free.append(lock_of(model).acquire(timeout=5)))
    thread.start()
    thread.join()
    return free == [True]


def subjects(family: str, name: str, actions: list[str]) -> Iterator[tuple[str, Subject]]:
    """Yield what is to be interrupted; nothing where the family refuses the patch."""
    case = next(case for case in CASES if case.name == name)
    plain = build(family, FAMILIES[family], case)
    inputs = brief_inputs(plain)
    registries()
    with contextlib.suppress(ap.AttnPatchError):
        model = copy.deepcopy(plain)
        report = ap.apply(model, case.patch)
        if not report.changed:
            return
        patched, original = content(model, inputs), content(plain, inputs)
        for action in actions:
            model = copy.deepcopy(plain)
            report = ap.apply(model, case.patch) if action in ("revert", "verify") else None
            subject = _subject(action, model, case.patch, report, inputs)
            subject.after = {"apply": patched, "revert": original, "patched": patched}.get(action)
            yield action, subject


def _subject(action: str, model: Any, patch: Any, report: Any, inputs: Any) -> Subject:
    def block() -> None:
        with ap.patched(model, patch):
            trace(model, inputs)

    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: ap.apply(model, patch),
        "plan": lambda: ap.plan(model, patch),
        "patched": block,
        "verify": lambda: ap.verify(model, save=False),
        "revert": lambda: report.revert(),
    }
    before = {"content": content(model, inputs), "snapshot": snapshot(model), "modes": modes()}
    return Subject(model, calls[action], before, None, inputs, calls["revert"] if action == "revert" else None)


def _places(family: str, name: str, action: str, subject: Subject, by: str) -> int:
    """Count places, without children; twice, since the first run learns what later ones know."""
    case = next(case for case in CASES if case.name == name)
    for _ in range(2):
        twin, report, count = copy.deepcopy(subject.model), None, Injection(sys.maxsize, subject.judge, by)
        if action == "revert":
            twin = build(family, FAMILIES[family], case)
            report = ap.apply(twin, case.patch)
        count.run(_subject(action, twin, case.patch, report, subject.inputs).call)
    return count.places


def interrupt(
    family: str, name: str, actions: list[str], sample: int | None, by: str = "way"
) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each action."""
    for action, subject in subjects(family, name, actions):
        start, every = time.perf_counter(), 1
        if sample is not None:
            every = max(1, _places(family, name, action, subject, by) // sample)
        injection = Injection(every, subject.judge, by)
        injection.run(subject.call)
        yield {
            **{"family": family, "patch": name, "action": action, "by": by, "lines": injection.lines},
            **{"places": injection.places, "tried": injection.found.total()},
            **{outcome: injection.found[outcome] for outcome in OUTCOMES},
            **{"seconds": round(time.perf_counter() - start), "examples": " | ".join(injection.examples[:3])},
        }


def page(rows: list[dict[str, str]]) -> str:
    """The README beside the table."""
    total = {key: sum(int(row[key]) for row in rows) for key in ("tried", *OUTCOMES)}
    pairs = len({(row["family"], row["patch"]) for row in rows})
    lines = [
        "# Interruption",
        "",
        f"**{total['damaged']} of {total['tried']} models damaged** by a KeyboardInterrupt before a line that writes "
        f"or leads there: {total['before']} are what they were, {total['after']} what they were to become.",
        "",
        "`make interrupt` (`scripts/interrupt.py`). The work runs once; before a line runs, the process forks. The "
        "child raises there and compares the model with what it was (every object, container, field and bit, logits) "
        "and with what it was to become (every bit), then torch's modes, the random state, the handler of Ctrl-C and "
        "the lock; `revert` is called again and must finish. A place is a line, by *way* with the functions of the "
        "package through which it was reached; in loops that write or put back, the first, second, fourth ... time. "
        f"{pairs} pairs of family and patch; families refuse the others. `interruption.csv` has each.",
        "",
        "| action | by | pairs | places | tried | share | before | after | damaged |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for by, action in itertools.product(("line", "way"), ACTIONS):
        own = [row for row in rows if (row["action"], row["by"]) == (action, by)]
        places, tried, *found = (sum(int(row[key]) for row in own) for key in ("places", "tried", *OUTCOMES))
        if own:
            numbers = " | ".join(map(str, (len(own), places, tried, f"{tried / places:.0%}", *found)))
            lines.append(f"| `{action}` | {by} | {numbers} |")
    return "\n".join(lines) + "\n"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["family"], row["patch"], row["action"], row["by"]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--patches", nargs="+", default=list(PATCHES), choices=[case.name for case in CASES])
    parser.add_argument("--actions", nargs="+", default=list(ACTIONS), choices=ACTIONS)
    parser.add_argument("--sample", type=int, help="places of each action, spread evenly; all by default")
    parser.add_argument("--by", default="way", choices=("way", "line"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--until", help="stop before another pair begins after this time of day, as 06:20")
    given = parser.parse_args()
    table, console = given.out / "interruption.csv", Console()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = {_key(row): row for row in csv.DictReader(table.open())} if table.exists() else {}
    whole = {key for key, row in rows.items() if row["tried"] == row["places"] or given.sample}
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    for name in given.patches if not given.render else []:
        for family in given.families:
            actions = [action for action in given.actions if (family, name, action, given.by) not in whole]
            if not actions or (given.until and time.strftime("%H:%M") >= given.until):
                continue
            for row in interrupt(family, name, actions, given.sample, given.by):
                console.print(*(f"{row[key]}" for key in COLUMNS), highlight=False, soft_wrap=True)
                rows[_key(row)] = {key: str(value) for key, value in row.items()}
                with table.open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows.values())
    (given.out / "README.md").write_text(page(list(rows.values())))
    sys.exit(any(int(row["damaged"]) for row in rows.values()))


if __name__ == "__main__":
    main()
