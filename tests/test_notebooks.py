"""Notebooks: each runs from its first cell to its last on the embedded model, and its pair holds the same cells."""

import ast
import json
import re

import page_texts as pages
import pytest

from hf_attnpatch import embedded
from hf_attnpatch.patch import REGISTRY

FOLDER = pages.ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
NEEDS = {"trainer_and_peft": "peft", "longer_context": "matplotlib"}


def cells(source):
    """Kind and text of each cell of a script in jupytext's percent format."""
    body = source.read_text("utf-8").split("# ---\n", 2)[2]
    for part in re.split(r"^# %%", body, flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n")
        if head.strip() == "[markdown]":
            yield "markdown", "\n".join(re.sub("^# ?", "", line) for line in text.strip().splitlines())
        else:
            yield "code", text.strip()


def test_there_are_six_to_eight_and_the_readme_of_the_folder_names_each():
    assert 6 <= len(SOURCES) <= 8
    listed = (FOLDER / "README.md").read_text("utf-8")
    for source in SOURCES:
        assert f"]({source.stem}.ipynb)" in listed


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_pair_holds_the_same_cells(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text("utf-8"))
    held = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert held == list(cells(source)), "run `make notebooks`"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_notebook_runs(source, tmp_path, monkeypatch):
    pytest.importorskip(NEEDS.get(source.stem, "torch"))
    whole = embedded.heldout
    monkeypatch.setattr(embedded, "heldout", lambda domain=None: [text[:5000] for text in whole(domain)])
    monkeypatch.setattr("hf_attnpatch.patch.REGISTRY", dict(REGISTRY))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "builtins"}  # where a dataclass of a cell looks itself up
    for number, (kind, text) in enumerate(cells(source)):
        if kind == "code":
            _run(text, names, f"{source.stem}, cell {number}")


def _run(text, names, where):
    """As a notebook does: a last line that is an expression is shown."""
    tree = ast.parse(text)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    if shown is not None:
        value = eval(compile(ast.Expression(shown.value), where, "eval"), names)
        page = value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)
        assert page
