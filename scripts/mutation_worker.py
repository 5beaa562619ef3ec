"""Runs tests against mutants: everything heavy is imported once, and every mutant is a fork that imports the rest.

A mutant's file is never on disk: an import hook serves its text. Tests that do not reach the mutated statement are not
run; those that do are run fastest first, until one fails. No fork may take more than a few GB: a mutated limit does.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import sysconfig
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
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import providers

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
        imported: file -> lines that run when it is imported.
    """

    seconds: dict[str, float]
    reached: dict[str, dict[int, list[str]]]
    imported: dict[str, set[int]]

    def tests(self, path: Path, lines: tuple[int, int]) -> list[str]:
        """Ids of the tests that reach a statement of a file, fastest first; all where it runs at import."""
        span, reached = range(lines[0], lines[1] + 1), self.reached.get(str(path), {})
        found = {test for line in span for test in reached.get(line, ())}
        if not found and self.imported.get(str(path), set()).intersection(span):
            found = set(self.seconds)
        return sorted(found, key=self.seconds.__getitem__)


class _Recorder:
    """A pytest plugin: how long each test takes, and which lines of the file it runs."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.cover, self.seconds = cover, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.cover.switch_context(item.nodeid)
        started = time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - started
        self.cover.switch_context("")
        return result


class _Chosen:
    """A pytest plugin: these tests alone, in this order, and no search for the smallest failing example."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: i for i, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        quick = settings(settings.get_profile("repeatable"), phases=(Phase.explicit, Phase.generate))
        settings.register_profile("quick", quick)
        settings.load_profile("quick")

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


@functools.cache  # modules of one folder share their tests
def baseline(tests: tuple[str, ...]) -> Baseline:
    """Run tests on the package as it is, in a fork, and import here what they imported of other projects.

    Args:
        tests: files, or ids in them.

    Raises:
        SystemExit: they do not pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "baseline.json"
        code = _forked(lambda: _record(tests, found), 3600, show=True)
        if code:
            raise SystemExit(f"{tests}: end with {code} before anything is mutated; see above.")
        told = json.loads(found.read_text())
    for name in told.pop("modules"):
        with contextlib.suppress(ImportError):  # made by other modules, not importable by name
            importlib.import_module(name)
    gc.freeze()  # what is here now is never looked at again, in no fork
    reached = {path: {int(n): ids for n, ids in lines.items()} for path, lines in told["reached"].items()}
    return Baseline(told["seconds"], reached, {path: set(lines) for path, lines in told["imported"].items()})


def _record(tests: Sequence[str], found: Path) -> int:
    cover = coverage.Coverage(data_file=None, include=["hf_attnpatch/*"], config_file=False)
    recorder = _Recorder(cover)
    cover.start()
    code = pytest.main([*_FLAGS, *tests], plugins=[recorder])
    cover.stop()
    data = cover.get_data()
    contexts = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
    found.write_text(
        json.dumps(
            {
                "seconds": recorder.seconds,
                "reached": {
                    path: {n: [name for name in names if name] for n, names in lines.items()}
                    for path, lines in contexts.items()
                },
                "imported": {
                    path: [n for n, names in lines.items() if "" in names] for path, lines in contexts.items()
                },
                "modules": [name for name, module in sys.modules.items() if _others(module)],
            }
        )
    )
    return int(code)


def _others(module: object) -> bool:
    file = getattr(module, "__file__", None) or ""
    homes = [sysconfig.get_path("stdlib"), *(p for p in sys.path if p.endswith("site-packages"))]
    return file.startswith(tuple(homes))


def outcome(name: str, path: Path, source: str, tests: Sequence[str], limit: float) -> str:
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
        sys.meta_path.insert(0, _Served(name, path, source))
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return int(pytest.main([*_FLAGS, *files], plugins=[_Chosen(tests)]))

    code = _forked(run, limit)
    if code is None:
        return "timeout"
    if code < 0:  # by a signal, such as a crash in a kernel
        return "killed"
    return _OUTCOMES[code]


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
