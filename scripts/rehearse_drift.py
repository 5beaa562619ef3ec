"""Rehearses the next transformers: every patch on copies of the installed one with a change each.

    python scripts/rehearse_drift.py                                        # everything; writes recipes/results/drift
    python scripts/rehearse_drift.py --list                                 # names of mutations, families and cases
    python scripts/rehearse_drift.py --mutations cache --families llama gpt2 --patches alibi rotary   # some; printed
    python scripts/rehearse_drift.py --rename cache=kv_store                # a mutation of one's own: old=new[,old=new]
    python scripts/rehearse_drift.py --rename scaling=scale@attribute       # in some roles only
    python scripts/rehearse_drift.py --move masking_utils=masks.attention   # a module goes elsewhere
    python scripts/rehearse_drift.py --again crash silent vague refused q_proj   # only what these words say, once more
    python scripts/rehearse_drift.py --page                                 # asks nothing: writes what is there so far

A copy changes what all models share, the models that are asked and those of stock homes; `--whole-package` changes the
others, too.

The release is asked first, once for each state of this code; what was answered is kept in outputs/drift, and the same
command goes on where it was stopped. With `--again`, answers of earlier states of this code count, and so do the
release's numbers; cells whose status, mutation, family, case or patch is among the words are asked again, by the code
as it is now. The page says how many cells each state has answered.

Exit status 1: a crash, a silent cell, a mutation that is none, or less than 80 % of the cells the same.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drifting import copies, report
from drifting.cells import UNPATCHED
from drifting.mutations import MUTATIONS, Mutation, by_name, moving, renaming
from drifting.rehearsal import OUTPUTS, ROOT, Cell, Found, Reference, installed, rehearse
from drifting.source import InvalidMutation

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "recipes/results/drift"
ANSWERS = OUTPUTS / "answers.jsonl"  # one a line, as they come

# of each way in which a patch can act
FAMILIES = (
    *("llama", "gpt2", "opt", "gpt_neox", "bloom", "mpt", "falcon"),
    *("qwen3", "gemma3_text", "phi3", "mistral", "granite", "gptj", "bert", "t5"),
)
# every patch, a setting or two of each
CASES = (
    *("grouped_2_mean", "grouped_2_principal", "grouped_2_calibrated"),
    *("rope_linear", "rope_dynamic", "rope_yarn", "rope_longrope", "rope_yarn_per_request", "rope_dynamic_per_request"),
    *("alibi", "alibi_eager", "relative_xl", "rotary", "rotary_linear", "sinusoidal", "no_position", "position_table"),
    *("no_position_some", "score_temperature", "windowed", "latent", "latent_small"),
    *("self_extend", "dual_chunk", "re_rope", "jet_long", "attention_sinks", "recurrence"),
    *("flash_auto", "flash_flex"),
)


def kinds() -> dict[str, str]:
    """The patch of each case, in the order of the table; a case of another name than those of `CASES` is allowed."""
    import patches

    return {case.name: case.kind for case in (*patches.CASES, *patches.IDENTITIES)}


def chosen_cases(asked: Sequence[str]) -> list[str]:
    """Cases by their own name or that of their patch, "unpatched" for none of them; `CASES` where none is asked."""
    own = kinds()
    found = [case for case in own if case in asked or (own[case] in asked and case in CASES)]
    unknown = [word for word in asked if word not in {*own, *own.values(), UNPATCHED}]
    if unknown:
        raise SystemExit(f"--patches {' '.join(unknown)}: no such case; see --list")
    return found if asked else list(CASES)


def folders(families: Iterable[str]) -> dict[str, str]:
    """The folder below ``models`` of each family."""
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    return {family: model_type_to_module_name(family) for family in families}


def changed_models(families: Iterable[str]) -> list[str]:
    """The folders below ``models`` that a copy changes: the families', those of stock homes, and the Auto classes'.

    A model that moves to a home is of the home's classes: a copy that changed only those it came from would contradict
    itself.
    """
    from hf_attnpatch.homes.rows import HOMES, LATENT_HOMES

    homes = folders(home.model_type for home in (*HOMES, *LATENT_HOMES))
    return sorted({"auto", *folders(families).values(), *homes.values()})


def remembered(file: Path, code: str, again: Collection[str] | None = None) -> dict[tuple[str, str], dict[Cell, Found]]:
    """Answers of earlier runs, by mutation and digest; of two the later counts.

    Args:
        file: of answers.
        code: state of this code that they must be of.
        again: statuses, mutations, families, cases and patches: answers of other states of the code count, too, but
            for theirs; None for none.
    """
    found: dict[tuple[str, str], dict[Cell, Found]] = {}
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        answer = json.loads(line)
        if answer["code"] == code or again is not None:
            own = found.setdefault((answer["mutation"], answer["change"]), {})
            own[tuple(answer["cell"])] = {**answer["found"], "code": answer["code"]}
    patch = kinds()
    for (mutation, _), own in found.items() if again is not None else ():
        for cell, answer in list(own.items()):
            words = {mutation, answer["status"], *cell, patch.get(cell[1], "")}
            if answer["code"] != code and words & set(again or ()):
                del own[cell]
    return found


def ask_release(
    reference: Reference, families: Sequence[str], cases: Sequence[str], ask: bool = True
) -> dict[Cell, Found]:
    """The cells that the release has; those that it refuses are none, and those that crash are said."""
    wanted = [(family, case) for family in families for case in (UNPATCHED, *cases)]
    wanted = wanted if ask else reference.known(wanted)
    found, start = {}, time.monotonic()
    for number, (cell, answer) in enumerate(reference.ask(wanted, Mutation("", ()).vocabulary), 1):
        found[cell] = answer
        _progress(f"the release: {number} of {len(wanted)}, {time.monotonic() - start:.0f} s, {' '.join(cell)}")
    for cell, answer in found.items():
        if answer["status"] == "crash":
            print(f"no cell: {' '.join(cell)} fails on the release itself: {answer['detail']}")
        for stage, why in answer.get("omitted", {}).items():
            print(f"no numbers: {' '.join(cell)}, {stage}: {why[:200]}")
    return {cell: answer for cell, answer in found.items() if answer["status"] == "same"}


def ask_copies(
    mutations: Sequence[Mutation],
    cells: Iterable[Cell],
    reference: Reference,
    workers: int,
    again: Collection[str] | None = None,
    ask: bool = True,
) -> Iterator[tuple[str, Cell, Found]]:
    """Yield the answers of all mutations, `workers` of them at a time; each is kept as it comes."""
    code, cells = reference.release.code, list(cells)
    known = remembered(ANSWERS, code, again)
    waiting, answers = list(mutations)[::-1], queue.Queue()
    digests = {m.name: copies.digest(reference.release.package, m.changes) for m in mutations}  # of any families

    def run() -> None:
        try:
            while waiting:
                mutation = waiting.pop()
                own = known.get((mutation.name, digests[mutation.name]), {})
                for cell, found in rehearse(mutation, cells, reference, own, ask):
                    answers.put((mutation.name, cell, found, cell not in own))
        finally:
            answers.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    ended = 0
    with ANSWERS.open("a", encoding="utf-8") as log:
        while ended < workers:
            answer = answers.get()
            if answer is None:
                ended += 1
                continue
            name, cell, found, new = answer
            if new:
                line = {"code": code, "mutation": name, "change": digests[name], "cell": cell, "found": found}
                log.write(json.dumps(line) + "\n")
                log.flush()
            yield name, cell, {"code": code, **found}


def main() -> None:
    """Rehearses, prints, and writes where every mutation and patch was asked of ten families or more."""
    arguments = _arguments()
    if arguments.list:
        print("mutations:", *(m.name for m in MUTATIONS), "\nfamilies:", *FAMILIES, "\ncases:", *CASES, sep="\n  ")
        return
    own = [*map(renaming, arguments.rename), *map(moving, arguments.move)]
    mutations = [*map(by_name, arguments.mutations), *own] or list(MUTATIONS)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    own_folder = folders(arguments.families)
    models = () if arguments.whole_package else changed_models(arguments.families)
    if arguments.page:
        arguments.again = []
    latest = arguments.again is not None
    reference = Reference(installed(), arguments.limit, models=models, latest=latest, folders=own_folder)
    cases, start = chosen_cases(arguments.patches), time.monotonic()
    cells = ask_release(reference, arguments.families, cases, not arguments.page)
    total = len(mutations) * len(cells)
    answers: dict[tuple[str, Cell], Found] = {}
    for name, cell, found in ask_copies(
        mutations, cells, reference, arguments.workers, arguments.again, not arguments.page
    ):
        answers[name, cell] = found
        seconds = time.monotonic() - start
        _progress(f"{len(answers)} of {total}, {seconds:.0f} s, {name}: {' '.join(cell)}: {found['status']}")
    order = {m.name: i for i, m in enumerate(mutations)}
    answers = dict(sorted(answers.items(), key=lambda item: (order[item[0][0]], list(cells).index(item[0][1]))))
    whole = not (arguments.mutations or own or arguments.patches) and len(arguments.families) >= 10
    own_patch = {case: kind for case, kind in kinds().items() if case in cases}
    _finish(answers, own_patch, _facts(answers, arguments.families, total) if whole else None)


def _finish(answers: Mapping[tuple[str, Cell], Found], own: Mapping[str, str], facts: Mapping[str, Any] | None) -> None:
    print()
    print(report.table(answers, own))
    print("\n".join(["", *report.failures(answers), report.summary(answers)]))
    if facts is not None:
        report.write(RESULTS, answers, own, facts)
        print(f"written to {RESULTS.relative_to(ROOT)}")
    sys.exit(0 if report.passed(answers) else 1)


def _facts(answers: Mapping[tuple[str, Cell], Found], families: Sequence[str], total: int) -> dict[str, Any]:
    import importlib.metadata

    versions = {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
    states = Counter(found["code"] for found in answers.values())
    asked = Counter(mutation for mutation, _ in answers)
    return {
        **versions,
        "families": ", ".join(families),
        "mutations": f"{len(asked)} of {len(MUTATIONS)}",
        "asked": f"{len(answers)} cells of {total}, proofs that unpatched models are the same among both",
        "states of the code": ", ".join(f"{state} ({number} cells)" for state, number in states.most_common()),
    }


def _progress(text: str) -> None:
    end = "\r" if sys.stderr.isatty() else "\n"
    print(text[:150].ljust(150 if end == "\r" else 0), end=end, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", nargs="+", default=[], help="only these of the table; nothing is written")
    parser.add_argument("--rename", nargs="+", default=[], metavar="OLD=NEW", help="mutations of one's own")
    parser.add_argument("--move", nargs="+", default=[], metavar="MODULE=MODULE", help="mutations of one's own")
    parser.add_argument("--families", nargs="+", default=FAMILIES, help="only these model types; nothing is written")
    parser.add_argument("--patches", nargs="+", default=[], help="only these patches or cases, or unpatched")
    parser.add_argument(
        "--again", nargs="+", metavar="WORD", help="keep the answers of earlier states of this code, but for these"
    )
    parser.add_argument("--page", action="store_true", help="ask nothing: write the page of all answers so far")
    parser.add_argument("--workers", type=int, default=2, help="mutations at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one cell")
    parser.add_argument(
        "--whole-package", action="store_true", help="change all models, not only those asked (minutes)"
    )
    parser.add_argument("--list", action="store_true", help="print what there is to choose from")
    arguments = parser.parse_args()
    try:
        for name in arguments.mutations:
            by_name(name)
    except InvalidMutation as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    main()
