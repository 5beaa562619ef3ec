"""The README's support table, made from the survey's JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

STATUSES = ("native", "own type", "not applicable", "FAILED")
_CELL = {"native": "stock", "own type": "own", "not applicable": "-", "FAILED": "**fails**"}


def table(survey: Mapping[str, Any]) -> str:
    """Summary, then per type, then the reasons; the long parts are folded."""
    parts = [
        summary(survey),
        _folded("Every type", _per_type(survey["rows"])),
        _folded("Why a patch does not apply", _reasons(survey["rows"], "not applicable")),
    ]
    failures = _reasons(survey["rows"], "FAILED")
    if failures.count("\n") > 1:
        parts.append(_folded("What fails", failures))
    own = _broken_by_transformers(survey["rows"])
    if own.count("\n") > 1:
        title = "Invariants that transformers' own model breaks; under a patch's name, its model of that config"
        parts.append(_folded(title, own))
    return "\n\n".join(parts)


def summary(survey: Mapping[str, Any]) -> str:
    """One line a patch: how many types, by what became of them."""
    rows, versions, types = survey["rows"], survey["versions"], survey["types"]
    masked = sum(name.endswith("(masked)") for name in rows)
    lines = [
        f"Tiny random models of {len(rows) - masked} of {types['causal']} causal-LM and {masked} of {types['masked']} "
        f"masked-LM types, transformers {versions['transformers']}, torch {versions['torch']}, CPU, fp32; every "
        "applied patch was held to "
        f"{len(survey['invariants'])} invariants (padding, cached decoding, saving, gradients ...).",
        "",
        "| patch | stock checkpoint | needs this package | not applicable | fails |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for case in _cases(rows):
        count = Counter(row[case]["status"] for row in rows.values() if case in row)
        lines.append(f"| {case} | " + " | ".join(str(count[status]) for status in STATUSES) + " |")
    return "\n".join(lines)


def _cases(rows: Mapping[str, Any]) -> list[str]:
    return [case for case in next(iter(rows.values())) if case != "unpatched"]


def _per_type(rows: Mapping[str, Any]) -> str:
    cases = _cases(rows)
    names = {"position_table": "table", "segment_recurrence": "recurrence", "relative_xl": "xl", "no_position": "none"}
    short = [names.get(case, case.removeprefix("grouped_query ").removeprefix("rope_scaling ")) for case in cases]
    said = "`down`, `up`: grouped_query; `linear` to `llama3`: rope_scaling; " + ", ".join(
        f"`{short}`: {name}" for name, short in names.items()
    )
    lines = [f"{said}.", ""]
    lines += ["| type | " + " | ".join(short) + " |", "| --- " * (len(cases) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_CELL[row[case]["status"]] for case in cases) + " |")
    return "\n".join(lines)


def _reasons(rows: Mapping[str, Any], status: str) -> str:
    lines = ["| type | patch | reason |", "| --- | --- | --- |"]
    for name, row in rows.items():
        for detail, cases in _grouped(row, status):
            lines.append(f"| {name} | {cases} | {_plain(detail)} |")
    return "\n".join(lines)


def _grouped(row: Mapping[str, Any], status: str) -> Iterator[tuple[str, str]]:
    """Reasons of one type, patches with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for case, found in row.items():
        if found["status"] == status:
            by_reason.setdefault(found.get("detail", ""), []).append(case)
    for detail, cases in by_reason.items():
        kinds = [case.removeprefix("rope_scaling ") for case in cases if case.startswith("rope_scaling ")]
        others = [case for case in cases if not case.startswith("rope_scaling ")]
        yield detail, ", ".join([*others, *([f"rope_scaling {'/'.join(kinds)}"] if kinds else [])])


def _broken_by_transformers(rows: Mapping[str, Any]) -> str:
    lines = ["| type | invariant |", "| --- | --- |"]
    for name, row in rows.items():
        unpatched = row.get("unpatched", {})
        broken = [f"{invariant} ({_plain(why)})" for invariant, why in unpatched.get("broken", {}).items()]
        if unpatched.get("status") == "FAILED":
            broken = [_plain(unpatched["detail"])]
        for case, found in row.items():
            if case != "unpatched":  # and not the patch's: transformers' own model of the patched config does so
                broken += [f"{case}: {invariant} ({_plain(why)})" for invariant, why in found.get("broken", {}).items()]
        if broken:
            lines.append(f"| {name} | {'; '.join(broken)} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that neither ends a table cell nor reads as markup."""
    return text[:240].replace("|", "/").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
