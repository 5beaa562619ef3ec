"""The mutation pass: what a mutant is, and what its pages say. Generating mutants needs mutmut (`make mutation`)."""

import importlib
import sys
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


SOURCE = '''"""A module."""

LIMIT = 3


def read(x: int, strict: bool = True) -> int:
    """Docstring 1."""
    if x > LIMIT and strict:
        raise ValueError("more than 3")
    x.train(mode=x)
    return x - 1
'''


def _new_lines():
    pytest.importorskip("mutmut", reason="is installed by make mutation")
    mutants = importlib.import_module("mutants")
    return mutants, {(one.operator, one.new) for one in mutants.mutants(SOURCE)}


def test_guards_defaults_constants_and_calls_are_mutated_and_words_are_not():
    _, found = _new_lines()
    assert {
        ("number + 1", "LIMIT = 4"),
        ("number - 1", "LIMIT = 2"),
        ("name", "def read(x: int, strict: bool = False) -> int:"),
        ("operator", "if x >= LIMIT and strict:"),
        ("operator", "if x > LIMIT or strict:"),
        ("guard", "if False:"),
        ("guard", "if True:"),
        ("dropped", "pass"),
        ("no argument", "x.train()"),
        ("operator", "return x + 1"),
        ("number + 1", "return x - 2"),
    } <= found
    assert not any("Docstring" in new or "than" in new for _, new in found)


def test_a_sample_stays_when_lines_come_and_go():
    mutants, _ = _new_lines()
    drawn = mutants.sample(mutants.mutants(SOURCE), 5, "seed")
    moved = mutants.sample(mutants.mutants(SOURCE.replace("LIMIT = 3", "\n\nLIMIT = 3")), 5, "seed")
    assert [one.key for one in drawn] == [one.key for one in moved]
    assert [one.lines[0] + 2 for one in drawn] == [one.lines[0] for one in moved]


def test_pages_count_what_is_left(tmp_path):
    page = importlib.import_module("mutation_page")
    module = page.Module("functional/a.py", 90, 40, 35, 4, 1, 0, 12)
    changes = [("survived", "survived"), ("survived", "killed"), ("survived", "equivalent"), ("not covered", "killed")]
    rows = [
        page.Row(module.module, "f", "x = 1", f"x = {n}", 0, "number", 3, first, now, "as good" * (now == "equivalent"))
        for n, (first, now) in enumerate(changes)
    ]
    page.write(tmp_path, {module.module: module}, {row.key: row for row in rows})
    modules, again = page.read(tmp_path)
    assert modules == {module.module: module}
    assert again == {row.key: row for row in rows}
    text = (tmp_path / "README.md").read_text()
    assert "| `functional/a.py` | 90 | 40 | 35 | 1 | 4 | 0 | 1 | 0 | 1 | 0 | 12 |" in text
    assert "| all | 90 | 40 | 35 | 1 | 4 | 0 | 1 | 0 | 1 | 0 | 12 |" in text
    assert text.count("`` x = 1 `` ->") == 2
    assert "as good" in text


HELD = '''"""A module that is imported already."""

import functools

LIMIT = 3


def inside(x, most=LIMIT):
    return x < most


@functools.cache
def cached(x):
    return x + 1


class Thing:
    size = 2

    @property
    def double(self):
        return 2 * self.size

    @staticmethod
    def beyond(x):
        return x > LIMIT
'''


@pytest.fixture
def held(monkeypatch, tmp_path):
    """A module, another that took things from it, and a way to change its code."""
    path = tmp_path / "held_by_test.py"
    path.write_text(HELD)
    monkeypatch.syspath_prepend(str(tmp_path))
    module, other = importlib.import_module("held_by_test"), types.ModuleType("test_that_holds")
    vars(other).update({name: getattr(module, name) for name in ("LIMIT", "inside", "cached", "Thing")})
    monkeypatch.setitem(sys.modules, "test_that_holds", other)
    swap = importlib.import_module("mutation_swap").swap
    yield other, lambda old, new: swap("held_by_test", path, HELD.replace(old, new))
    del sys.modules["held_by_test"]


@pytest.mark.parametrize(
    ("old", "new", "asked"),
    [
        ("x < most", "x <= most", lambda held: held.inside(3)),
        ("x + 1", "x + 2", lambda held: held.cached(2) == 4),
        ("2 * self", "3 * self", lambda held: held.Thing().double == 6),
        ("size = 2", "size = 5", lambda held: held.Thing().double == 10),
        ("x > LIMIT", "x < LIMIT", lambda held: held.Thing.beyond(2)),
        ("LIMIT = 3", "LIMIT = 4", lambda held: held.LIMIT == 4 and held.inside(3) and not held.Thing.beyond(4)),
    ],
)
def test_code_is_changed_where_others_hold_it(old, new, asked, held):
    other, swapped = held
    thing = other.Thing()
    assert not asked(other)
    assert swapped(old, new) > 0
    assert asked(other)
    assert isinstance(thing, other.Thing)


def test_what_changes_nothing_is_told(held):
    other, swapped = held
    assert swapped("imported already", "imported long ago") == 0
    assert swapped("class Thing:", "class Thing(dict):") == 0  # so that it is imported anew
    assert other.inside(2)


def test_a_fork_has_a_few_gigabytes():
    pytest.importorskip("mutmut", reason="is installed by make mutation")
    worker = importlib.import_module("mutation_worker")
    assert worker._forked(lambda: len(bytearray(1 << 20)) >> 20, 60) == 1
    assert worker._forked(lambda: len(bytearray(worker.MEMORY + 1)), 60) == 3  # a MemoryError, not the machine's end
