"""Asks every patch of every model type transformers can build, and writes what came of it into the support table.

    python scripts/survey_architectures.py                       # everything; JSON, then the support table and pages
    python scripts/survey_architectures.py --resume              # the same, going on where one was cut off
    python scripts/survey_architectures.py --types llama gpt2    # some; printed, nothing written
    python scripts/survey_architectures.py --quick               # what applies now and did not, or the reverse
    python scripts/survey_architectures.py --render              # the table and the pages again, from the JSON
    python scripts/survey_architectures.py --check               # exit 1 unless pages and JSON agree

Each question gets a process of its own, forked from one that has imported everything, so a crash, a hang or an endless
allocation is one cell of the table and never the end of the survey. An applied patch is held to the invariants of
`hf_attnpatch.verify`; one that the unpatched model breaks as well is transformers' own and is listed apart, and so is
one that transformers' own model of the patched config and weights breaks, whose logits are the patched model's bit for
bit. Flex attention runs uncompiled, as in the tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages
import readme
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from survey_cases import ASKED, CASES, Answer
from survey_table import summary

import hf_attnpatch as ap
from hf_attnpatch.invariants import INVARIANTS
from hf_attnpatch.upstream.calls import interface

sys.path.insert(0, str(readme.README.parent / "tests"))

from architectures import causal_lm_types, encoder_types, tiny_model

RESULTS = pages.SURVEY
ANSWERS = readme.README.parent / "outputs/survey/answers.jsonl"  # one a line, as they come
LIMIT = 300  # seconds for one question, waiting for a busy machine included; --limit


@dataclass(frozen=True)
class Question:
    """One patch on one model type; `encoder` chooses its masked-LM class."""

    model_type: str
    encoder: bool
    case: str

    @property
    def row(self) -> str:
        """The name of its row: the type, marked where the masked class is meant."""
        return f"{self.model_type} (masked)" if self.encoder else self.model_type


def answer(question: Question, file: str) -> None:
    """In a process of its own: writes the answer; whatever goes wrong ends up as the last line of the error output."""
    sys.stderr = open(f"{file}.err", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    model = tiny_model(question.model_type, encoder=question.encoder)
    try:
        found = CASES[question.case](model)
    except ap.UnsupportedArchitecture as reason:
        found = {"status": "not applicable", "detail": " ".join(str(reason).split())}
    Path(file).write_text(json.dumps(found))


def ask_all(questions: Sequence[Question], workers: int, limit: float = LIMIT) -> Iterator[tuple[Question, Answer]]:
    """Asks in `workers` processes at a time, each for `limit` seconds at most, and yields answers as they come."""
    fork = multiprocessing.get_context("fork")
    interface()  # learned once, before the processes part
    gc.freeze()  # what is here now is not looked through, and so not copied, in each process
    waiting, running = list(questions)[::-1], {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < workers:
                question, file = waiting.pop(), f"{folder}/{len(waiting)}"
                process = fork.Process(target=answer, args=(question, file))
                process.start()
                running[question] = (process, file, time.monotonic())
            time.sleep(0.02)
            for question, (process, file, start) in list(running.items()):
                if process.is_alive() and time.monotonic() - start > limit:
                    process.kill()
                    process.join()
                    with open(f"{file}.err", "a") as log:
                        print(f"\nkilled after {limit} s; more with --limit", file=log)
                process.join(timeout=0)
                if process.exitcode is not None:
                    del running[question]
                    yield question, _collect(process.exitcode, file)


def _collect(exitcode: int, file: str) -> Answer:
    if exitcode == 0 and Path(file).is_file():
        found: Answer = json.loads(Path(file).read_text())
        return found
    lines = (
        Path(f"{file}.err").read_text(errors="replace").strip().splitlines() if Path(f"{file}.err").is_file() else []
    )
    return {"status": "FAILED", "detail": (lines or [f"no message, exit code {exitcode}"])[-1][:300]}


def judged(answers: Mapping[Question, Answer]) -> dict[str, dict[str, Answer]]:
    """Rows of the table: what a patched model breaks, and neither the unpatched one nor its twin, is the patch's."""
    rows: dict[str, dict[str, Answer]] = {}
    for question, found in sorted(answers.items(), key=lambda item: (item[0].encoder, item[0].model_type)):
        row = rows.setdefault(question.row, {})
        own = answers.get(Question(question.model_type, question.encoder, "unpatched"), {}).get("broken", {})
        found = dict(found)
        broken, twin = found.pop("broken", {}), found.pop("twin", {})
        worse = broken if question.case == "unpatched" else {k: v for k, v in broken.items() if k not in own}
        ours = {} if question.case == "unpatched" else {k: v for k, v in worse.items() if k not in twin}
        if ours:
            found = {"status": "FAILED", "detail": "; ".join(f"{name}: {why}" for name, why in ours.items())[:300]}
        elif worse:
            found["broken"] = worse
        row[question.case] = found
    return rows


def remembered() -> dict[Question, Answer]:
    """Answers of a survey that was cut off; of two to one question the later counts."""
    lines = ANSWERS.read_text("utf-8").splitlines() if ANSWERS.is_file() else []
    return {Question(*question): found for question, found in map(json.loads, lines)}


def survey(
    types: Sequence[str], workers: int, answers: dict[Question, Answer], *, limit: float = LIMIT, keep: bool = True
) -> dict[str, Any]:
    """Everything, as the JSON has it, less what is answered already; with `keep`, to be gone on with."""
    kinds = [*((t, False) for t in causal_lm_types()), *((t, True) for t in encoder_types())]
    chosen = [(t, encoder) for t, encoder in kinds if not types or t in types]
    questions = [Question(t, encoder, case) for t, encoder in chosen for case in CASES]
    todo = [question for question in questions if question not in answers]
    place = ANSWERS if keep else Path(os.devnull)
    with Progress(console=Console(stderr=True)) as progress, place.open("a", encoding="utf-8") as log:
        bar = progress.add_task("survey", total=len(todo))
        for question, found in ask_all(todo, workers, limit):
            answers[question] = found
            log.write(json.dumps([dataclasses.astuple(question), found]) + "\n")
            log.flush()
            progress.update(bar, advance=1, description=f"{question.row}: {question.case}"[:44].ljust(44))
    versions = {"hf_attnpatch": ap.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    ordered = {question: answers[question] for question in questions}
    there_are = {"causal": len(causal_lm_types()), "masked": len(encoder_types())}
    return {"versions": versions, "types": there_are, "invariants": list(INVARIANTS), "rows": judged(ordered)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield each cell that applied in an earlier survey and does not, or the reverse; then how many are as before."""
    pairs = [
        (row, case, before["rows"].get(row, {}).get(case, {}).get("status", "-"), found)
        for row, cases in now["rows"].items()
        for case, found in cases.items()
    ]
    works = ("native", "own type")
    changed = [
        pair for pair in pairs if (pair[2] in works) != (pair[3]["status"] in works) or pair[3]["status"] == "FAILED"
    ]
    for row, case, was, found in sorted(changed, key=lambda pair: (pair[2] not in works, pair[1], pair[0])):
        yield f"{row} | {case} | {was} -> {found['status']} | {found.get('detail', '')[:160]}"
    versions = f"transformers {before['versions']['transformers']} -> {now['versions']['transformers']}"
    yield f"{versions}: {len(pairs) - len(changed)} of {len(pairs)} cells as before"


def main() -> None:
    """Surveys, renders or checks, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[], help="only these model types; nothing is written")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds for one question; more on a busy machine")
    parser.add_argument("--quick", action="store_true", help="apply and revert only; prints what changed")
    parser.add_argument("--resume", action="store_true", help="keep the answers of a survey that was cut off")
    parser.add_argument(
        "--render", action="store_true", help="write the table and the pages from the JSON that is there"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 unless the pages are those of the JSON")
    arguments = parser.parse_args()
    if arguments.check:
        stale = [file.relative_to(readme.ROOT).as_posix() for file in pages.outdated()]
        sys.exit(f"not what the results say: {', '.join(stale)}; run --render." if stale else None)
    if arguments.quick:
        ASKED.clear()
        found = survey(arguments.types, arguments.workers, {}, limit=arguments.limit, keep=False)
        print("\n".join(differences(json.loads(RESULTS.read_text("utf-8")), found)))
        return
    if not arguments.render:
        ANSWERS.parent.mkdir(parents=True, exist_ok=True)
        if not arguments.resume and not arguments.types:
            ANSWERS.unlink(missing_ok=True)
        answers = remembered() if arguments.resume else {}
        found = survey(arguments.types, arguments.workers, answers, limit=arguments.limit, keep=not arguments.types)
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        if arguments.types:
            print(text)
            return
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text, "utf-8")
    for file in pages.write():
        print(f"wrote {file.relative_to(readme.ROOT)}")
    print(summary(json.loads(RESULTS.read_text("utf-8"))))


if __name__ == "__main__":
    main()
