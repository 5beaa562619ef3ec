"""Markdown tables of a comparison, and the conditions of its measurements."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.comparison.store import Store

MISSING = "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *rows))


def number(value: float | None, form: str) -> str:
    """A number, or that it is missing."""
    return MISSING if value is None else format(value, form)


def write_page(path: Path, parts: Iterable[str]) -> None:
    """Writes a Markdown page of the parts that are not empty; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", "utf-8")
    os.replace(temporary, path)


def conditions(store: Store) -> str:
    """Which machine and versions measured the cells, and how busy the machine was."""
    places = [row["environment"] for row in store.rows.values()]
    if not places:
        return ""
    say: Callable[[str], str] = lambda key: ", ".join(dict.fromkeys(str(place[key]) for place in places))  # noqa: E731
    loads = [place["load"] for place in places if place["load"] is not None]
    busy: Any = f", load average {min(loads)} to {max(loads)} when cells began" if loads else ""
    versions = ", ".join(f"{name} {say(name)}" for name in ("python", "torch", "transformers", "hf_attnpatch"))
    return (
        f"{say('cpu')}, {say('cores')} cores, {say('threads')} threads{busy}: where others were at work, wall seconds "
        f"say little and CPU seconds more. {versions} (digest of its sources: {say('code')}), {say('date')}."
    )
