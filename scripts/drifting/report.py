"""The table of a rehearsal: mutation by patch."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cells import UNPATCHED
from .plot import draw
from .rehearsal import STATUSES, Cell, Found

WANTED = 0.8  # of all cells, to be the same
BAD = ("crash", "silent", "invalid")

Answers = Mapping[tuple[str, Cell], Found]  # by mutation and cell


def counts(answers: Answers) -> Counter[str]:
    """How many cells ended in which way; proofs that a mutation is one count where they failed."""
    found = Counter({status: 0 for status in STATUSES})
    found.update(f["status"] for (_, cell), f in answers.items() if cell[1] != UNPATCHED or f["status"] == "invalid")
    return found


def passed(answers: Answers) -> bool:
    """Whether something was asked, nothing crashed or was silently wrong, and enough still works."""
    found = counts(answers)
    return bool(answers) and not any(found[status] for status in BAD) and found["same"] >= WANTED * sum(found.values())


def summary(answers: Answers) -> str:
    """One line."""
    found = counts(answers)
    total = sum(found.values())
    share = 100 * found["same"] / total if total else 0.0
    return f"{total} cells: " + ", ".join(f"{found[s]} {s}" for s in STATUSES if found[s]) + f"; {share:.1f} % the same"


def failures(answers: Answers, statuses: Sequence[str] = ("crash", "silent", "invalid", "vague")) -> list[str]:
    """A line for each cell that failed, those of one cause together."""
    causes: dict[tuple[str, str, str, str], list[str]] = {}
    for (mutation, (family, case)), found in answers.items():
        if found["status"] in statuses:
            key = (mutation, found["status"], found.get("at", ""), found["detail"])
            causes.setdefault(key, []).append(f"{family} {case}")
    lines = []
    for (mutation, status, at, detail), cells in sorted(causes.items()):
        some = ", ".join(cells[:6]) + (f" and {len(cells) - 6} more" if len(cells) > 6 else "")
        lines.append(f"{status}: {mutation}: {at or 'no place of ours'}: {detail[:300]} [{len(cells)}: {some}]")
    return lines


def table(answers: Answers, kinds: Mapping[str, str]) -> str:
    """Markdown: a row for each mutation, a column for each patch: cells the same of all, and what else there was.

    Args:
        answers: of all cells.
        kinds: the patch of each case.
    """
    mutations = list(dict.fromkeys(mutation for mutation, _ in answers))
    patches = list(dict.fromkeys(kinds.values()))
    head = ["mutation", *(s for s in STATUSES), *patches]
    lines = [_row(head), _row(["---"] * len(head))]
    for mutation in mutations:
        own = {key: found for key, found in answers.items() if key[0] == mutation}
        total = counts(own)
        by_patch = [_share(found for (_, (_, case)), found in own.items() if kinds.get(case) == p) for p in patches]
        lines.append(_row([mutation, *(str(total[s]) for s in STATUSES), *by_patch]))
    total = counts(answers)
    by_patch = [_share(found for (_, (_, case)), found in answers.items() if kinds.get(case) == p) for p in patches]
    lines.append(_row(["all", *(str(total[s]) for s in STATUSES), *by_patch]))
    return "\n".join(lines)


def _share(found: Iterable[Found]) -> str:
    own = Counter(f["status"] for f in found)
    return f"{own['same']}/{sum(own.values())}" if own else ""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(folder: Path, answers: Answers, kinds: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write the page, its picture, every cell as CSV, and the counts as JSON.

    Args:
        folder: for the four files.
        answers: of all cells.
        kinds: the patch of each case.
        facts: versions, families and the like, for page and JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "drift.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["mutation", "family", "case", "patch", "status", "at", "detail"])
        for (mutation, (family, case)), found in answers.items():
            rest = (found.get("at", ""), found.get("detail", ""))
            rows.writerow([mutation, family, case, kinds.get(case, ""), found["status"], *rest])
    whole = {**facts, "counts": dict(counts(answers)), "passed": passed(answers)}
    (folder / "drift.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw(folder / "drift.svg", answers, kinds)
    (folder / "README.md").write_text(page(answers, kinds, facts), "utf-8")


def page(answers: Answers, kinds: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """The page."""
    said = "\n".join(f"* {name}: {value}" for name, value in facts.items())
    listed = "\n".join(f"* {line}" for line in failures(answers)) or "none"
    refused = "\n".join(f"* {line}" for line in failures(answers, ("refused",))) or "none"
    return (
        "# Drift, rehearsed\n\n"
        "Copies of transformers with one consistent change each, which leaves what it computes the same. Each cell is "
        "a patch on a family: `same` numbers as on the unchanged release (logits with a left-padded row, cached "
        "decoding, tokens of `generate`, logits after saving and loading), `refused` with an error that names what was "
        "not found, `vague` where it names nothing of it, `crash`, or `silent` where the numbers are others. A column "
        "shows how many cells of a patch are the same; a family that a change does not touch has none. Written by "
        "`make drift` (`scripts/rehearse_drift.py`; `--list` names mutations and cases); `drift.csv` has each cell.\n\n"
        f"**{summary(answers)}.**\n\n{said}\n\n![share of cells that work](drift.svg)\n\n{table(answers, kinds)}\n\n"
        f"## Crashes, silent and vague cells\n\n{listed}\n\n## Refusals\n\n{refused}\n"
    )
