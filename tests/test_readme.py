"""What the README shows works: its Python runs, its command lines parse, its make targets and paths exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from architectures import tiny_model

from hf_attnpatch import embedded
from hf_attnpatch.cli import app
from hf_attnpatch.commands import specs as cli_specs

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
SURVEY = ROOT / "recipes/results/survey/survey.json"
BENCH = ROOT / "recipes/results/apply/bench_apply.json"


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [body for name, body in found if name == language]


def commands(program):
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(program)]


@pytest.fixture
def in_scripts(monkeypatch):
    """The modules of scripts/ can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_runs(number, tmp_path, monkeypatch):
    small = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "vocab_size": 4096}
    monkeypatch.setattr(embedded, "load_model", lambda: tiny_model("llama", **small))
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[number], f"README.md, block {number}", "exec"), {})


def test_python_blocks_are_there():
    assert len(blocks("python")) >= 4


@pytest.mark.parametrize("words", commands("attnpatch"), ids=" ".join)
def test_command_lines_parse(words):
    group = typer.main.get_command(app)
    with group.make_context("attnpatch", words[1:2], resilient_parsing=True) as context:
        command = group.get_command(context, words[1])
        assert command is not None, words
        values = command.make_context(words[1], words[2:], parent=context).params
    assert all(cli_specs.parse(text) for text in values.get("patch", ()))
    assert cli_specs.patches(None, values.get("patch", ())) if values.get("patch") else True


def test_the_plan_is_one_that_can_be_used(tmp_path):
    (tmp_path / "plan.yaml").write_text(blocks("yaml")[0])
    found = cli_specs.patches(tmp_path / "plan.yaml", [])
    assert [patch.name for patch in found] == [spec["patch"] for spec in yaml.safe_load(blocks("yaml")[0])]


def test_make_targets_exist():
    mentioned = {words[1] for words in commands("make")} | set(re.findall(r"`make (?:\w+=\S* )?([\w-]+)", TEXT))
    assert {"demo", "test", "survey", "bench"} <= mentioned
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert mentioned <= defined


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci/run").read_text()
    assert ["make", "test"] in commands("make")
    assert re.search(r"^counted make test$", ci, re.MULTILINE)
    assert re.search(r"^make lint$", ci, re.MULTILINE)


def test_the_recipe_command_names_files_that_exist():
    (words,) = commands("accelerate")
    files = [word for word in words if "/" in word]
    assert len(files) == 2
    assert all((ROOT / file).is_file() for file in files)


def test_the_map_names_what_is_there():
    (tree,) = [block for block in blocks("") if block.startswith("hf_attnpatch/\n")]
    for line in tree.splitlines():
        names = re.findall(r"[\w/]+(?:\.py|/)", re.split(r"\s{3,}", line.strip())[0])
        folder = ROOT / "hf_attnpatch" if line.startswith("  ") else ROOT
        assert names, line
        assert all((folder / name).exists() for name in names), line


def test_the_map_names_every_module():
    (tree,) = [block for block in blocks("") if block.startswith("hf_attnpatch/\n")]
    modules = {path.name for path in (ROOT / "hf_attnpatch").glob("*.py")}
    hidden = {"__init__.py", "errors.py", "checkpoint.py"}
    rooms = {f"{path.parent.name}/" for path in (ROOT / "hf_attnpatch").glob("*/__init__.py")}
    assert {name for name in (modules - hidden) | rooms if name not in tree} == set()


@pytest.mark.skipif(not SURVEY.is_file(), reason="no survey has been run: make survey")
def test_the_support_table_is_current():
    command = [sys.executable, str(ROOT / "scripts/survey_architectures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not BENCH.is_file(), reason="no bench has been run: make bench")
def test_the_measured_costs_are_those_of_the_json(in_scripts):
    import bench_report
    import readme

    assert readme.is_current("bench", bench_report.markdown(json.loads(BENCH.read_text("utf-8"))))
