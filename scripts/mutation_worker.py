"""Runs tests against mutants: they are imported and collected once, and every mutant is a fork that changes the code.

What cannot be changed where it stands (:mod:`mutation_swap`) is imported anew: a mutant's file is never on disk, an
import hook serves its text. Tests that do not reach the mutated statement are not run; those that do are run fastest
first, until one fails. No fork may take more than a few GB: a mutated limit does.
"""

from __future__ import annotations

import ast
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch
import transformers  # noqa: F401 - what takes the longest, before any fork
from _pytest.runner import runtestprotocol
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import providers
from mutation_swap import swap

ROOT = Path(__file__).resolve().parents[1]
_OFF = ("cacheprovider", "xdist", "unraisableexception", "threadexception")  # the last two collect garbage: 0.4 s a run
_FLAGS = ["-x", "-q", *(f"-pno:{name}" for name in _OFF), "-m", "not full and not slow and not compiled"]
MEMORY = 6 * 2**30  # bytes of a fork: a mutant that takes more is killed by a MemoryError
_OUTCOMES = {0: "survived", 1: "killed", 2: "killed", 3: "killed"}  # pytest's exit codes


@dataclass(frozen=True)
class Baseline:
    """What tests do without a mutant.

    Attributes:
        seconds: of each test, by its id.
        reached: file -> line -> the tests that ran it.
        imported: file -> lines that run when it is imported, which concern all tests that run any of it.
    """

    seconds: dict[str, float]
    reached: dict[str, dict[int, list[str]]]
    imported: dict[str, set[int]]

    def tests(self, path: Path, lines: tuple[int, int]) -> list[str]:
        """Ids of the tests that reach a statement of a file, fastest first; all where it runs at import."""
        span, reached = range(lines[0], lines[1] + 1), self.reached.get(str(path), {})
        found = {test for line in span for test in reached.get(line, ())}
        if self.imported.get(str(path), set()).intersection(span):
            found |= {test for tests in reached.values() for test in tests}
        return sorted(found, key=self.seconds.__getitem__)


class _Quick:
    """A pytest plugin: no search for the smallest failing example."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        quick = settings(settings.get_profile("repeatable"), phases=(Phase.explicit, Phase.generate))
        settings.register_profile("quick", quick)
        settings.load_profile("quick")


class _Chosen(_Quick):
    """A pytest plugin: these tests alone, in this order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os._exit(1)  # nothing of this process is wanted any more

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(kept, key=lambda item: self.place[item.nodeid])


class _Served(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Serves one module from a text."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self.source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def enter(tree: Path) -> None:
    """Take package and tests from this checkout."""
    providers.is_local_module_file = lambda path: False  # or every fork reads all sources for numbers to try
    os.chdir(tree)
    sys.path.insert(0, str(tree.resolve()))


class _Loop(_Quick):
    """A pytest plugin: in the place of running what was collected, something is done with it."""

    def __init__(self, work: Callable[[Room], None]) -> None:
        self.work = work

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("a file of tests cannot be imported")
        self.work(Room(session.items))
        return True


def session(tests: Sequence[str], work: Callable[[Room], None]) -> None:
    """Collect tests in a fork of this process, and do something with them there.

    Args:
        tests: files, or ids in them.
        work: is given them.

    Raises:
        SystemExit: they cannot be collected, or do not pass.
    """
    if code := _forked(lambda: int(pytest.main([*_FLAGS, *tests], plugins=[_Loop(work)])), float("inf"), show=True):
        raise SystemExit(f"{', '.join(tests)}: end with {code} before anything is mutated; see above.")


class Room:
    """Collected tests.

    Args:
        items: as pytest has them.
    """

    def __init__(self, items: Sequence[pytest.Item]) -> None:
        self.items = {item.nodeid: item for item in items}
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "baseline.json"
            if _forked(lambda: self._record(found), float("inf"), show=True):
                raise SystemExit("tests fail before anything is mutated.")
            told = json.loads(found.read_text())
        gc.freeze()  # what is here now is never looked at again, in no fork
        reached = {path: {int(n): ids for n, ids in lines.items()} for path, lines in told["reached"].items()}
        imported = {str(path): _at_import(path) for path in map(Path, reached)}
        self.baseline = Baseline(told["seconds"], reached, imported)

    def _record(self, found: Path) -> int:
        cover = coverage.Coverage(data_file=None, include=["hf_attnpatch/*"], config_file=False)
        cover.start()
        seconds = {}
        for name, item in self.items.items():
            cover.switch_context(name)
            started = time.perf_counter()
            if wrong := [report for report in runtestprotocol(item, log=False, nextitem=None) if report.failed]:
                print(name, wrong[0].longreprtext)
                return 1
            seconds[name] = time.perf_counter() - started
        cover.stop()
        data = cover.get_data()
        contexts = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
        reached = {path: {n: list(filter(None, ids)) for n, ids in lines.items()} for path, lines in contexts.items()}
        found.write_text(json.dumps({"seconds": seconds, "reached": reached}))
        return 0

    def outcome(self, name: str, path: Path, source: str, tests: Sequence[str], limit: float) -> str:
        """Run tests against a mutant: ``killed``, ``survived``, ``timeout`` or, without tests, ``not covered``.

        Args:
            name: of the module, dotted.
            path: its file.
            source: its text, mutated.
            tests: their ids, in the order to run them.
            limit: seconds after which it is ended.
        """
        if not tests:
            return "not covered"

        def run() -> int:
            if not swap(name, path, source):
                return _anew(name, path, source, tests)
            return int(any(r.failed for t in tests for r in runtestprotocol(self.items[t], log=False, nextitem=None)))

        code = _forked(run, limit)
        if code is None:
            return "timeout"
        return _OUTCOMES[code] if code >= 0 else "killed"  # by a signal, such as a crash in a kernel


def _anew(name: str, path: Path, source: str, tests: Sequence[str]) -> int:
    """Import the project once more, a module of it from another text, and run its tests."""
    for other in [n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(os.getcwd())]:
        if "site-packages" not in (sys.modules[other].__file__ or "") and not other.startswith(("__main__", "mut")):
            del sys.modules[other]
    sys.meta_path.insert(0, _Served(name, path, source))
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    return int(pytest.main([*_FLAGS, *files], plugins=[_Chosen(tests)]))


def _at_import(path: Path) -> set[int]:
    """Lines of a file outside of its functions."""
    tree = ast.parse(path.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {n for node in ast.walk(tree) if isinstance(node, kinds) for n in _body(node)}
    return {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)} - inside


def _body(node: Any) -> range:
    body = node.body if isinstance(node.body, list) else [node.body]
    return range(body[0].lineno, (node.end_lineno or 0) + 1)


def _forked(work: Callable[[], int], limit: float, show: bool = False) -> int | None:
    """Run something in a fork of this process; its exit code, None where it took too long."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(work, show)
    while time.monotonic() - started < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(work: Callable[[], int], show: bool) -> None:
    code = 3
    try:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        if not show:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)
