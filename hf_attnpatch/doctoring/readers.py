"""Who reads which field of a checkpoint's config: the reviewed rows of ``readers.yaml``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

READS, IGNORES, DIFFERS, WARNS, REFUSES, NO_LOSS = "reads", "ignores", "differs", "warns", "refuses", "not needed"
VERDICTS = (READS, IGNORES, DIFFERS, WARNS, REFUSES, NO_LOSS)
SILENT = (IGNORES, DIFFERS)  # other numbers, and nobody is told
TRANSFORMERS_5, TRANSFORMERS_4 = "transformers 5", "transformers 4"
READERS = (TRANSFORMERS_5, TRANSFORMERS_4, "llama.cpp", "vLLM")


@dataclass(frozen=True)
class Row:
    """How one reader treats one fact of a checkpoint.

    Attributes:
        fact: name of the thing; see :mod:`.facts`.
        reader: one of :data:`READERS`.
        verdict: one of :data:`VERDICTS`; ``ignores`` and ``differs`` are silent, ``warns`` drops it.
        says: what happens; empty where the verdict says it.
        source: repository, path, release and day.
        since: release or change from which this holds; empty where no other behaviour was looked at.
        types: model types that it holds for; empty for all that no other row names.
        unless: conditions of :data:`.facts.CONDITIONS`, under any of which nothing is lost.
    """

    fact: str
    reader: str
    verdict: str
    says: str
    source: str
    since: str = ""
    types: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


@functools.cache
def rows() -> tuple[Row, ...]:
    """Return all rows, in the order of the file."""
    data = yaml.safe_load((Path(__file__).parent / "readers.yaml").read_text("utf-8"))
    return tuple(
        _row(fact, reader, data["readers"][reader], fields)
        for fact, readers in data["facts"].items()
        for reader, found in readers.items()
        for fields in found
    )


def row_for(fact: str, reader: str, model_type: str) -> Row | None:
    """Return the row for a family: its own, or the one for all others; None if there is neither."""
    found = [r for r in rows() if (r.fact, r.reader) == (fact, reader) and (not r.types or model_type in r.types)]
    return min(found, key=lambda row: not row.types, default=None)


def _row(fact: str, reader: str, home: Mapping[str, Any], fields: Mapping[str, Any]) -> Row:
    source = f"{home['repository']} {home['folder']}/{fields['path']}, {home['release']}, {home['day']}"
    lists = {name: tuple(fields.get(name, ())) for name in ("types", "unless")}
    return Row(fact, reader, fields["verdict"], fields.get("says", ""), source, str(fields.get("since", "")), **lists)
