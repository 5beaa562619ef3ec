"""The support table, made from the survey's JSON: a summary for a page, and every cell as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

STATUSES = ("native", "own type", "not applicable", "FAILED")
WORDS = {"native": "stock", "own type": "package", "not applicable": "no", "FAILED": "fails"}


def summary(survey: Mapping[str, Any]) -> str:
    """One line a patch: how many types, by what became of them."""
    rows = survey["rows"]
    lines = [
        about(survey),
        "",
        "| patch | stock checkpoint | needs this package | does not apply | fails |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for case in cases(rows):
        count = Counter(row[case]["status"] for row in rows.values() if case in row)
        lines.append(f"| `{case}` | " + " | ".join(str(count[status]) for status in STATUSES) + " |")
    return "\n".join(lines)


def about(survey: Mapping[str, Any]) -> str:
    """What was surveyed, in a sentence or two."""
    rows, versions, types = survey["rows"], survey["versions"], survey["types"]
    masked = sum(name.endswith("(masked)") for name in rows)
    return (
        f"Tiny random models of {len(rows) - masked} of {types['causal']} causal-LM and {masked} of {types['masked']} "
        f"masked-LM types; transformers {versions['transformers']}, torch {versions['torch']}, CPU, fp32. "
        f"Every applied patch was held to {len(survey['invariants'])} invariants (padding, cached decoding, saving, "
        "gradients ...)."
    )


def cases(rows: Mapping[str, Any]) -> list[str]:
    """The patches asked, in order."""
    return [case for case in next(iter(rows.values())) if case != "unpatched"]


def as_csv(survey: Mapping[str, Any]) -> str:
    """A line for each type and patch: what became of it, why, and which invariants transformers itself breaks."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["type", "patch", "result", "reason", "broken by transformers itself"])
    for name, row in survey["rows"].items():
        for case in cases(survey["rows"]):
            if case in row:
                broken = "; ".join(f"{i} ({why})" for i, why in row[case].get("broken", {}).items())
                write.writerow([name, case, WORDS[row[case]["status"]], row[case].get("detail", ""), broken])
    return text.getvalue()


def broken_by_transformers(rows: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Type and invariant that the unpatched model breaks, or transformers' own model of the patched config."""
    for name, row in rows.items():
        unpatched = row.get("unpatched", {})
        if unpatched.get("status") == "FAILED":
            yield name, unpatched["detail"]
            continue
        yield from ((name, f"{invariant} ({why})") for invariant, why in unpatched.get("broken", {}).items())
        for case, found in row.items():
            if case != "unpatched":  # and not the patch's: transformers' own model of the patched config does so
                for invariant, why in found.get("broken", {}).items():
                    yield name, f"{case}: {invariant} ({why})"
