"""A cell: one measurement with a name and everything that it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from recipes.settings import SettingsError


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        name: path-like, such as `embedded/8-2/refined`.
        kind: how it is measured; the comparison knows its kinds.
        spec: everything it depends on, JSON-able.
    """

    name: str
    kind: str
    spec: Mapping[str, Any] = field(hash=False)

    @property
    def digest(self) -> str:
        """Digest of what it depends on: a result with another digest belongs to another cell."""
        return hashlib.sha256(json.dumps([self.kind, self.spec], sort_keys=True).encode()).hexdigest()[:12]

    def with_(self, **changes: Any) -> Cell:
        """Returns the cell with some of its settings changed."""
        return dataclasses.replace(self, spec={**self.spec, **changes})


def choose(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names match one of the patterns (`embedded/8-2/*`); all where there are none.

    Raises:
        SettingsError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in cells):
            raise SettingsError(f"--cells {pattern}: no such cell; --list shows all {len(cells)}.")
    return [cell for cell in cells if not patterns or matches(cell, patterns)]


def matches(cell: Cell, patterns: Sequence[str]) -> bool:
    """Whether a cell's name matches one of the patterns."""
    return any(fnmatch(cell.name, pattern) for pattern in patterns)
