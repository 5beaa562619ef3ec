"""The results: one JSON line for each finished cell, so that a stopped comparison can continue."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_attnpatch as ap
from hf_attnpatch.evaluation.hardware import processor
from recipes.comparison.cells import Cell

Row = Mapping[str, Any]


class Store:
    """The lines of `metrics.jsonl`; the last of a name counts.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self.reload()

    def reload(self) -> None:
        """Reads the file again: other runs may have written to it."""
        lines = self.path.read_text("utf-8").splitlines() if self.path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed write leaves half a line
        self.rows = {row["cell"]: row for row in rows}

    def has(self, cell: Cell) -> bool:
        """Whether a cell was measured with the settings it has now."""
        return cell.name in self.rows and self.rows[cell.name]["digest"] == cell.digest

    def add(self, cell: Cell, found: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Writes a finished cell; lines of other runs stay, a line of the same name is replaced."""
        row = {"cell": cell.name, "digest": cell.digest, "spec": cell.spec, **found, "environment": environment}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.reload()
            self.rows.pop(cell.name, None)
            self.rows[cell.name] = row
            temporary = self.path.with_name(f".tmp-{self.path.name}")
            temporary.write_text("".join(json.dumps(each) + "\n" for each in self.rows.values()), "utf-8")
            os.replace(temporary, self.path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other runs from writing."""
        import fcntl

        lock = os.open(self.path.parent, os.O_RDONLY)  # the folder itself: no file that others could put there first
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def get(self, name: str) -> Row | None:
        """The line of a cell, or None."""
        return self.rows.get(name)


def digest_of(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def environment(threads: int) -> dict[str, Any]:
    """Where a cell is measured."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "hf_attnpatch": ap.__version__}
    busy = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": processor(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": busy,
        "python": platform.python_version(),
        **versions,
        "code": code(),
    }


def code() -> str:
    """Digest of the package's sources: cells with different ones were measured with different code."""
    root = Path(ap.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]
