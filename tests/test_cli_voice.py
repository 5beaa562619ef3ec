"""What every command has: examples, JSON, quiet, YAML, completion, the terminal's width and colour, a way to go on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import typer
import yaml
from architectures import tiny_model
from test_cli import fails, run

import hf_attnpatch as ap
from hf_attnpatch import patches, progress, showing
from hf_attnpatch.cli import app
from hf_attnpatch.commands import catalogue, listing, voice
from hf_attnpatch.patch import fields_of
from hf_attnpatch.verify import Finding, Verification

ROOT = Path(__file__).parents[1]
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
HEADS = "grouped_query:num_kv_heads=2,method=first"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voice") / "llama"
    tiny_model("llama", max_position_embeddings=128).save_pretrained(folder)
    return folder


def process(*words, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-W", "ignore", "-m", "hf_attnpatch.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


# -- help, versions, lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_parse_and_has_what_all_have(name):
    text = " ".join(run(name, "-h").output.split())
    assert text == " ".join(run(name, "--help").output.split())
    assert "Examples: attnpatch" in text
    assert all(option in text for option in ("--json", "--quiet", "--config"))
    examples = [line for line in GROUP.commands[name].epilog.split("\n\n") if line.startswith("attnpatch ")]
    assert len(examples) >= 2
    for line in examples:
        words = [word for word in line.partition(" > ")[0].split()[2:]]
        if "--config" not in words:
            GROUP.commands[name].make_context(name, words)


def test_models_of_the_hub_have_revisions_and_checkpoints_have_shards():
    options = {name: {o for p in GROUP.commands[name].params for o in p.opts} for name in COMMANDS}
    for name in ("describe", "plan", "apply", "verify", "eval", "diagnose", "push", "search-rope"):
        assert "--revision" in options[name]
    assert {"--original-revision", "--patched-revision"} <= options["compare"]
    assert all("--max-shard-size" in options[name] for name in ("apply", "push", "search-rope"))


def test_versions_and_exit_codes_are_told():
    said = run("--version").output
    assert re.fullmatch(r"hf_attnpatch \S+, transformers \S+, torch \S+\n", said)
    assert said == run("-V").output
    assert "Exit codes: 0 done; 1 refused" in " ".join(run("-h").output.split())


def test_patches_are_listed_with_their_fields():
    found = json.loads(run("patches", "--json").output)["patches"]
    kinds = {kind.name: kind for kind in (getattr(patches, name) for name in patches.__all__)}
    assert [entry["name"] for entry in found] == sorted(kinds)
    for entry in found:
        kind = kinds[entry["name"]]
        assert [field["name"] for field in entry["fields"]] == list(fields_of(kind))
        assert entry["experimental"] == kind.experimental
        assert all(field["what"] and field["type"] for field in entry["fields"])
    assert all(name in run("patches").output for name in kinds)


def test_one_patch_is_explained():
    said = " ".join(run("patches", "self-extend").output.split())
    assert "length to reach, in tokens; None takes four times the trained length" in re.sub(r"[│ ]+", " ", said)
    assert "attnpatch apply MODEL OUT --patch self_extend" in said
    assert "must be given" in run("patches", "grouped_query").output
    assert fails(run("patches", "selfextend"), "did you mean self_extend?")


def test_env_names_versions_and_no_person(monkeypatch):
    monkeypatch.setenv("HF_HOME", os.path.expanduser("~/models"))
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example")
    monkeypatch.setattr(listing, "_gpus", lambda: ["A GPU, 1 MiB, 1.0"])
    found = json.loads(run("env", "--json").output)
    assert found["versions"]["hf_attnpatch"] == ap.__version__
    assert found["variables"]["HF_HOME"] == "~/models"
    assert found["variables"]["HF_ENDPOINT"] == "https://...@hub.example"
    assert "A GPU" in run("env").output


@pytest.mark.parametrize("words", ["-h", "apply -h", "patches", "patches alibi --json", "env", "--version"])
def test_what_needs_no_model_imports_none(words):
    """Importing transformers takes seconds."""
    code = """
import sys
from hf_attnpatch.cli import main
sys.argv[1:] = sys.argv[1].split()
try:
    main()
except SystemExit:
    print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_patches_and_fields(shell):
    def asked(line):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1), "_TYPER_COMPLETE_ARGS": line}
        how = {"_ATTNPATCH_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return process(env={**words, **how}).stdout

    assert "diagnose" in asked("attnpatch dia")
    assert "self_extend" in asked("attnpatch apply a b --patch self")
    shown = process("--show-completion", shell, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert f"_ATTNPATCH_COMPLETE=complete_{shell}" in shown.stdout


def test_completion_goes_on_with_fields_that_are_not_there_yet(tmp_path, monkeypatch):
    assert list(catalogue.completed_patches("no_")) == ["no_position"]
    found = list(catalogue.completed_patches("self_extend:group=2,t"))
    assert found == ["self_extend:group=2,target_length=", "self_extend:group=2,trained_length="]
    assert "self_extend:group=2,group=" not in list(catalogue.completed_patches("self_extend:group=2,"))
    assert list(catalogue.completed_patches("nothing:")) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    (tmp_path / "more").mkdir()
    assert list(catalogue.completed_models("mo")) == ["model", "more/"]
    assert "embedded" in list(catalogue.completed_models(""))


# -- for machines ------------------------------------------------------------------------------------------------------


def test_everything_is_json_where_it_is_asked_for(llama, tmp_path, monkeypatch):
    described = json.loads(run("describe", llama, "--json").stdout)
    assert described["architecture"] == "LlamaForCausalLM"
    assert [site["num_kv_heads"] for site in described["sites"]] == [4, 4]
    planned = json.loads(run("plan", llama, "-p", HEADS, "--json").stdout)
    assert planned["patches"][0]["patch"] == "grouped_query"
    assert planned["patches"][0]["edits"][0].keys() == {"where", "rung", "before", "after"}
    applied = run("apply", llama, tmp_path / "out", "-p", HEADS, "--json")
    found = json.loads(applied.stdout)
    assert found["saved"] == str(tmp_path / "out")
    assert found["stock"] is True
    assert "finite" in found["checks"]["logits"]
    assert found["patches"] == planned["patches"]
    passed = Verification("LlamaForCausalLM", (Finding("finite", "pass", 0.0, None, "logits"),))
    monkeypatch.setitem(sys.modules, "hf_attnpatch.verify", types.SimpleNamespace(verify=lambda model: passed))
    verified = json.loads(run("verify", tmp_path / "out", "--json").stdout)
    assert verified["passed"] is True
    assert verified["findings"][0].keys() == {"invariant", "outcome", "measured", "tolerance", "note"}


def test_numbers_that_json_has_not_are_null():
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, voice.speaking(True, False):
        patch.setattr(voice.typer, "echo", lambda text: told.write(text))
        voice.answer("x", {"a": float("nan"), "b": (float("inf"), 1.5), "c": Path("d"), "e": ap.Flash()})
    assert json.loads(told.getvalue()) == {
        "a": None,
        "b": [None, 1.5],
        "c": "d",
        "e": {"backend": "auto", "training": None},
    }


def test_quiet_says_nothing_beside_the_answer(llama, tmp_path):
    done = run("apply", llama, tmp_path / "out", "-p", HEADS, "--quiet")
    assert (done.exit_code, done.stdout) == (0, "")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "LlamaAttention" in run("describe", llama, "-q").stdout
    assert fails(run("apply", llama, tmp_path / "out", "-p", HEADS, "-q"), "is not empty")


# -- YAML --------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_whole_of_a_command_and_the_command_line_wins(llama, tmp_path):
    settings = {
        "model": str(llama),
        "out": str(tmp_path / "out"),
        "patch": [{"patch": "grouped_query", "num_kv_heads": 2, "method": "first"}, {"patch": "flash"}],
        "dtype": "bfloat16",
        "max_shard_size": "60KB",
        "overwrite": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = run("apply", "--config", tmp_path / "run.yaml", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["dtype"]) == (2, "float32")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert json.loads(run("plan", "--config", tmp_path / "plan.yaml").stdout or "{}") == {}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"model": str(llama), "patch": HEADS, "json": True}))
    assert json.loads(run("plan", "--config", tmp_path / "plan.yaml").stdout)["stock"] is True


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"modle": "x"}, "no option modle (did you mean model?)"),
        ({"trust_remote_code": True}, "stands on the command line or nowhere"),
        (["model"], "wanted a mapping of options"),
        ({"model": {"a": 1}}, "model is a dict of 1; wanted one value"),
        ({"patch": [3]}, "patch 0 is 3; wanted a mapping with a `patch:`"),
        ({"patch": [{"patch": "flash"}, "alibi"]}, "mixes mappings and text"),
        ({"patch": [{"patch": "flash", "backend": "mallory/attention"}]}, "a repository whose code would run"),
        ("a: [", "YAML"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(llama, tmp_path, content, said):
    file = tmp_path / "run.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    assert fails(run("plan", llama, "--config", file), said)


# -- options of all ----------------------------------------------------------------------------------------------------


def test_a_folder_has_no_revisions(llama):
    assert fails(run("describe", llama, "--revision", "main"), "--revision main", "only the Hub has revisions")


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "5 GB", "-1GB"])
def test_a_size_that_is_none_is_refused_before_any_work(llama, tmp_path, size):
    done = run("apply", llama, tmp_path / "out", "-p", HEADS, f"--max-shard-size={size}")
    assert done.exit_code == 2
    assert "500MB or 5GB" in " ".join(re.sub("[│╭╰─╮╯]", " ", done.stderr).split())


def test_tables_are_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "90")
    with voice.speaking(False, False):
        assert showing.rendered("word " * 60).splitlines()[0].rstrip() == ("word " * 18).rstrip()
    assert len(showing.rendered("word " * 60).splitlines()[0]) > 100


@pytest.mark.parametrize(("setting", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(monkeypatch, setting, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(voice.typer, "secho", lambda text, fg, err: seen.append((text, fg, err)))
    voice.complain("attnpatch: no")
    assert seen == [("attnpatch: no", "red" if coloured else None, True)]


# -- long work ---------------------------------------------------------------------------------------------------------


def test_a_log_is_told_now_and_then_how_long_the_rest_takes(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 7))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.spoken(True):
        assert list(progress.track(range(12), "refining")) == list(range(12))
    said = capsys.readouterr().err.splitlines()
    assert said == ["refining: 2 of 12, some 1:10 left", "refining: 7 of 12, some 0:35 left"]
    for aloud in (progress.spoken(False), progress.spoken(True)):
        with aloud:
            assert list(progress.track([1], "short")) == [1]
    assert list(progress.track([1, 2], "as a library")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_says_how_to_go_on(llama, tmp_path):
    """A signal is sent once the command is at work; OUT is not there, and stderr says what to do."""
    words = [sys.executable, "-W", "ignore", "-m", "hf_attnpatch.cli", "apply", llama, tmp_path / "out", "-p", HEADS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, env=environment)
    while running.poll() is None and not any(tmp_path.glob(".out.attnpatch-*/new")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "attnpatch: stopped; OUT is what it was; the same command starts anew."
    assert not list(tmp_path.iterdir())
