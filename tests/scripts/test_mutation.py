"""The mutation pass: what a mutant is, and what its pages say. Generating mutants needs mutmut (`make mutation`)."""

import importlib
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
