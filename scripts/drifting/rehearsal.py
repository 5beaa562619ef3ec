"""Runs workers in front of copies, and takes up what an earlier run has answered."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import copies
from .cells import UNPATCHED
from .mutations import Mutation
from .source import PACKAGE, InvalidMutation
from .worker import MARK

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ROOT / "outputs/drift"
WORKER = ("-W", "ignore", "-m", "drifting.worker")
LIMIT = 300  # seconds for one cell, waiting for a busy machine included

Cell = tuple[str, str]  # family, case
Found = dict[str, Any]
STATUSES = ("same", "refused", "vague", "crash", "silent", "invalid")


@dataclass(frozen=True)
class Release:
    """The installed transformers and this code, which the numbers are of.

    Attributes:
        root: folder that holds the package.
    """

    root: Path

    @property
    def package(self) -> Path:
        """The folder of transformers."""
        return self.root / PACKAGE

    @property
    def code(self) -> str:
        """Digest of all that the numbers depend on."""
        own = [
            *(ROOT / "hf_attnpatch").rglob("*.py"),
            *(ROOT / "tests" / f"{n}.py" for n in ("architectures", "patches")),
        ]
        own += [Path(__file__).with_name(f"{name}.py") for name in ("cells", "worker", *copies.ENGINE)]
        parts = [path.read_bytes() for path in sorted(own)]
        return hashlib.sha256(b"\0".join([*parts, copies.digest(self.package, ()).encode()])).hexdigest()[:16]


def installed() -> Release:
    """The release of this Python, found without importing it."""
    import importlib.util

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Release(Path(spec.origin).parents[1])


class Reference:
    """The release's own numbers, asked for once per code.

    Args:
        release: to be asked.
        limit: seconds for one cell.
        outputs: folder for numbers and copies.
        models: folders of models that a copy changes, the others staying as they are; all where there are none.
        folders: the folder below ``models`` of each family, where it is known.
        latest: whether the numbers of another state of the code serve, those of the latest.
    """

    def __init__(
        self,
        release: Release,
        limit: float = LIMIT,
        outputs: Path = OUTPUTS,
        models: Sequence[str] = (),
        latest: bool = False,
        folders: Mapping[str, str] | None = None,
    ):
        self.release, self.limit, self.outputs, self.models = release, limit, outputs, models
        self.folders = folders or {}
        self.place = outputs / "reference" / release.code
        states = sorted(self.place.parent.glob("*"), key=lambda state: state.stat().st_mtime)
        if latest and states:
            self.place = states[-1]

    def known(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return the cells that were asked before."""
        return [cell for cell in cells if self._file(cell).is_file()]

    def ask(self, cells: Iterable[Cell], words: Mapping[str, str]) -> Iterator[tuple[Cell, Found]]:
        """Yield the cells with what the release makes of them; asked where not known yet."""
        cells = list(cells)
        todo = [cell for cell in cells if not self._file(cell).is_file()]
        yield from ((cell, self.found(cell)) for cell in cells if cell not in set(todo))
        for cell, found in work(self.release.root, todo, words, self.place, keep=True, limit=self.limit):
            if not self._file(cell).is_file():  # the process died
                self._file(cell).parent.mkdir(parents=True, exist_ok=True)
                self._file(cell).write_text(json.dumps(found), "utf-8")
            yield cell, found

    def found(self, cell: Cell) -> Found:
        """What the release makes of a cell."""
        found: Found = json.loads(self._file(cell).read_text("utf-8"))
        return found

    def _file(self, cell: Cell) -> Path:
        return self.place / cell[0] / f"{cell[1]}.json"


def work(
    root: Path, cells: Sequence[Cell], words: Mapping[str, str], reference: Path, *, keep: bool, limit: float
) -> Iterator[tuple[Cell, Found]]:
    """Ask cells in one process in front of `root`; one that dies or hangs costs a cell, and a new one goes on."""
    left = list(cells)
    while left:
        job = {"cells": left, "words": dict(words), "reference": str(reference), "root": str(root), "keep": keep}
        for cell, found in _one_process(root, job, limit):
            left.remove(cell)
            yield cell, found


def _one_process(root: Path, job: Mapping[str, Any], limit: float) -> Iterator[tuple[Cell, Found]]:
    paths = [root, ROOT / "scripts", ROOT / "tests", ROOT]
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *WORKER, json.dumps(job)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=ROOT)
        assert process.stdout is not None
        cell, answered, slow = tuple(job["cells"][0]), False, threading.Event()
        timer = _killing(process, limit, slow)
        for line in process.stdout:
            if not line.startswith(MARK):
                continue
            timer.cancel()
            said = json.loads(line.removeprefix(MARK))
            answered = "cell" in said
            cell = tuple(said.pop("cell" if answered else "start"))
            if answered:
                yield cell, said
            timer = _killing(process, limit, slow)
        process.wait()
        timer.cancel()
        if process.returncode and not (answered and list(cell) == list(job["cells"][-1])):
            yield from _died(process.returncode, cell, answered, job, slow.is_set(), errors, limit)


def _killing(process: subprocess.Popen[str], limit: float, slow: threading.Event) -> threading.Timer:
    def kill() -> None:
        slow.set()
        process.kill()

    timer = threading.Timer(limit, kill)
    timer.daemon = True
    timer.start()
    return timer


def _died(
    code: int, cell: Cell, answered: bool, job: Mapping[str, Any], slow: bool, errors: Any, limit: float
) -> Iterator[tuple[Cell, Found]]:
    """The cell that a process died of: the one begun, or the one behind the last that was answered."""
    cells = [tuple(c) for c in job["cells"]]
    if answered:
        cell = cells[cells.index(cell) + 1]
    errors.seek(0)
    last = (errors.read().strip().splitlines() or ["no message"])[-1][:400]
    why = f"killed after {limit:g} s" if slow else f"the process died with exit code {code}: {last}"
    yield cell, {"status": "crash", "detail": why, "at": ""}


def rehearse(
    mutation: Mutation, cells: Sequence[Cell], reference: Reference, known: Mapping[Cell, Found], ask: bool = True
) -> Iterator[tuple[Cell, Found]]:
    """Yield the outcome of each cell under a mutation; all are `invalid` where unpatched models are not the same.

    A family that the mutation does not touch has no cells.

    Args:
        mutation: to be rehearsed.
        cells: that the release has, `UNPATCHED` among them for each family.
        reference: the release's numbers.
        known: answers of an earlier run, which are not asked again.
        ask: the others.
    """
    place = reference.outputs / "copies" / "".join(c if c.isalnum() else "_" for c in mutation.name)
    families = list(dict.fromkeys(family for family, _ in cells))
    try:
        copies.make(reference.release.package, place, mutation.changes, reference.models)
    except InvalidMutation as error:
        yield from (((family, UNPATCHED), {"status": "invalid", "detail": str(error)}) for family in families)
        return
    folder = reference.folders
    families = [f for f in families if f not in folder or copies.touches(place, folder[f])]
    order = [c for family in families for c in sorted((c for c in cells if c[0] == family), key=_proof_first)]
    invalid = set()
    old = [(cell, known[cell]) for cell in order if cell in known]
    todo = [cell for cell in order if ask and cell not in known]
    new = work(place, todo, mutation.vocabulary, reference.place, keep=False, limit=reference.limit)
    for cell, found in itertools.chain(old, new):
        if cell[1] == UNPATCHED and found["status"] != "same":
            invalid.add(cell[0])
            yield cell, {**found, "status": "invalid"}
        elif cell[0] not in invalid:
            yield cell, _named(mutation, found)


def _proof_first(cell: Cell) -> bool:
    return cell[1] != UNPATCHED


def _named(mutation: Mutation, found: Found) -> Found:
    """A refusal that names nothing of what has changed is `vague`."""
    if found["status"] == "refused" and not names(mutation, found["detail"]):
        return {**found, "status": "vague"}
    return found


def names(mutation: Mutation, text: str) -> bool:
    """Whether a refusal names what was not found: the old word, the new one, or what they stand for."""
    parts = {part for word in mutation.words for part in (word, *word.split("_")) if len(part) > 3}
    return any(part.lower() in text.lower() for part in parts)
