"""The table that `check_downstream.py` prints and writes: Markdown for people, beside the JSON that it comes from."""

from __future__ import annotations

from typing import Any

from downstream_compare import SAME, TIES

Row = dict[str, Any]
COLUMNS = (
    *("checkpoint", "key-value heads", "runtime", "same prompts", "same tokens"),
    *("largest difference, nats", "KL, nats", "seconds", "verdict"),
)


def passes(row: Row) -> bool:
    """Whether a runtime continued a checkpoint as the reference does."""
    return row["verdict"] in (SAME, TIES)


def cells(row: Row) -> list[str]:
    """A row of the table; a runtime that did not run has its reason in the place of figures."""
    verdict = row["verdict"] if passes(row) else f"**{row['verdict']}**"
    name = f"{row['checkpoint']} (control)" if row["control"] else row["checkpoint"]
    if "finding" not in row:
        return [name, "-", row["runtime"], *["-"] * 4, "-", verdict]
    found = row["finding"]
    counts = (f"{found[f'equal_{what}']} of {found[what]}" for what in ("prompts", "tokens"))
    figures = (f"{found['largest_difference']:.1e}", f"{found['kl']:.1e}", f"{row['seconds']:.0f}")
    return [name, str(row["kv_heads"]), row["runtime"], *counts, *figures, verdict]


def conclusions(rows: list[Row]) -> list[str]:
    """For each runtime that fails: whether it fails on the control too."""
    lines = []
    for row in [row for row in rows if not passes(row)]:
        controls = [other for other in rows if other["control"] and other["runtime"] == row["runtime"]]
        if row["control"]:
            told = f"{row['runtime']}'s own: no patch is in this checkpoint"
        elif not controls:
            told = "no control was given: --control FOLDER tells the runtime's own differences"
        elif all(map(passes, controls)):
            told = "the control passes: it is the converted checkpoint, or what this runtime makes of it"
        else:
            told = f"the control fails too, so {row['runtime']} by itself may be the cause"
        lines.append(f"{row['checkpoint']}, {row['runtime']}: {row['verdict']}; {told}.")
    return lines


def departures(rows: list[Row], texts: dict[str, dict[str, str]]) -> list[str]:
    """A line for each departure; `texts` holds the tokens' text by checkpoint and id."""
    lines = []
    for row in rows:
        for d in row.get("finding", {}).get("departures", ()):
            wanted, found = (_quoted(texts[row["checkpoint"]], d[key]) for key in ("wanted", "found"))
            gap = f"{'at least ' if d['at_least'] else ''}{d['gap']:.2g} nats"
            where = f"{row['checkpoint']}, {row['runtime']}: prompt {d['prompt']}, token {d['step']}"
            lines.append(f"{where}: {found}, transformers {wanted}, which it prefers by {gap}.")
    return lines


def _quoted(texts: dict[str, str], token: int) -> str:
    return f"`{texts[str(token)]!r}` ({token})".replace("|", "\\|")


def _finding(rows: list[Row]) -> str:
    """How many checkpoints run alike in how many runtimes."""
    good, names = sum(map(passes, rows)), ", ".join(dict.fromkeys(row["runtime"] for row in rows))
    return f"**{good} of {len(rows)} pairs of a checkpoint and a runtime write what transformers writes ({names}).**"


def markdown(record: dict[str, Any]) -> str:
    """The whole file."""
    rows, settings = record["rows"], record["settings"]
    table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    departed = departures(rows, record["texts"])
    parts = [
        "# Downstream",
        _finding(rows),
        "Written by `" + record["command"] + "`.",
        f"{settings['prompts']} prompts of {settings['shortest']} to {settings['longest']} tokens, "
        f"{settings['new_tokens']} greedy tokens each, float32 on CPU ({record['machine']}). The reference is "
        "`generate` of stock transformers with its cache, in a process that does not import hf_attnpatch; its own row "
        "is one forward without cache and shows the size of rounding.",
        "\n".join(f"| {' | '.join(line)} |" for line in table),
        "`same tokens`: those before a continuation departs. `largest difference`: of the "
        f"{settings['top']} largest log-probabilities at each of the reference's tokens; `KL`: reference to runtime, "
        f"mean of a token. A departure is a near tie where transformers prefers its own token by at most "
        f"{settings['near_tie']:g} nats; differences above {settings['at_most']:g} nats fail.",
        "## What departs and what fails" if departed or conclusions(rows) else "",
        "\n".join(f"* {line}" for line in [*departed, *conclusions(rows)]),
        "## What was run",
        _listed(record["checkpoints"], "checkpoint", "patches", "it goes on after the first prompt with"),
        _listed(record["runtimes"], "runtime", "versions", "how"),
        "\n".join(f"* The GGUF converter warned of `{line}`: {', '.join(of)}." for line, of in _warned(rows).items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(rows: list[list[str]], *heads: str) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _warned(rows: list[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        for line in row.get("warnings", ()):
            found.setdefault(line, []).append(row["checkpoint"])
    return found
