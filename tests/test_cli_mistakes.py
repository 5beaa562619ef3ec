"""What a user of the command line may get wrong, or find broken on the disk: one line, before hours of work."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from architectures import tiny_model
from test_cli import fails, run

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.commands import models as cli_models
from hf_attnpatch.commands import text as cli_text
from hf_attnpatch.errors import AttnPatchError

HEADS = ("-p", "grouped_query:num_kv_heads=2,method=first")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


def with_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def half_a_weights_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def half_a_tokenizer(folder):
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "tokenizer.json").write_text('{"version": ')


DAMAGES = {
    half_a_weights_file: ("is damaged", "lies beyond its"),
    half_a_tokenizer: ("cannot be loaded",),
    lambda folder: with_config(folder, num_key_value_heads="four"): ("cannot be loaded", "num_key_value_heads"),
    lambda folder: with_config(folder, num_key_value_heads=0): ("cannot be loaded", "ZeroDivisionError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(whole, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    damage(folder)
    assert fails(run("apply", folder, tmp_path / "out", *HEADS), str(folder), *DAMAGES[damage])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:1000"])
def test_a_device_that_is_not_there_is_one_line(whole, tmp_path, device):
    assert fails(run("apply", whole, tmp_path / "out", *HEADS, "--device", device), f"--device {device}", "wanted cpu")


@pytest.mark.parametrize("command", [("plan", "-p", "flash"), ("describe",), ("apply", "out", *HEADS)])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path, command):
    name, *rest = command
    quiet = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, "-W", "ignore", "-m", "hf_attnpatch.cli", name, "nobody/nothing", *rest]
    environment = {**os.environ, **quiet}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "attnpatch: nobody/nothing: the Hub cannot be reached, and no copy of it is in the cache of this machine; look "
        "at the connection and at HF_ENDPOINT, or name a folder."
    ]


@pytest.mark.parametrize(
    ("patch", "given", "words"),
    [
        ("GroupedQuery", {}, "num_kv_heads is missing; it must be a whole number"),
        ("SegmentRecurrence", {"segment_length": 8}, "memory_length is missing; it must be a number of tokens"),
        ("PositionTable", {}, "target_length is missing; give it, in tokens, or factor"),
        ("RopeScaling", {}, "kind is missing; choose from: linear, ntk"),
        ("RopeScaling", {"kind": "yarn"}, "factor is missing; give it, new context over old, or target_length"),
    ],
)
def test_a_missing_argument_is_said_with_the_choices(patch, given, words):
    cls = getattr(ap, patch)
    for refused in (lambda: cls(**given), lambda: ap.from_spec({"patch": cls.name, **given})):
        with pytest.raises(ap.AttnPatchError, match=words):
            refused()


@pytest.mark.parametrize("out", ["/proc/out", "file/out", "file/more/out"])
def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it(whole, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    found = run("apply", whole, out, *HEADS)
    assert fails(found, f"{out}: cannot be written (", "wanted a name in a folder that can be")
    assert "Errno" not in found.stderr
    assert ".attnpatch-" not in found.stderr


def test_a_file_that_is_not_there_is_named_without_a_number(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run("apply", whole, "out", "--plan", "nowhere.yaml")
    assert fails(found, "attnpatch: nowhere.yaml: no such file or directory")


def test_a_file_is_no_repository_of_the_hub(whole, monkeypatch):
    monkeypatch.chdir(whole.parent)
    monkeypatch.setattr("hf_attnpatch.publishing.hub.is_reachable", lambda: pytest.fail("the Hub was asked"))
    assert fails(run("describe", f"{whole.name}/config.json"), "is a file", "wanted the folder of a checkpoint")


def test_a_mistake_in_code_keeps_its_traceback():
    with pytest.raises(AttributeError), cli_models._explained("model"):
        raise AttributeError("a bug")


def test_a_plan_that_is_no_text_is_one_line(whole, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_bytes(b"\xff\xfe- patch")
    assert fails(run("plan", whole, "--plan", plan), "plan.yaml", "not UTF-8")


def test_the_folder_that_holds_the_model_is_never_replaced(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "in" / "llama")
    for out in (tmp_path, tmp_path / "in"):
        assert fails(run("apply", tmp_path / "in" / "llama", out, *HEADS, "--overwrite"), "holds MODEL")
    monkeypatch.chdir(tmp_path / "in")
    assert fails(run("apply", "llama", ".", *HEADS, "--overwrite"), "is the current folder")
    assert (tmp_path / "in" / "llama" / "model.safetensors").is_file()
    done = run("apply", "llama", "llama", *HEADS, "--overwrite")  # itself is what --overwrite is for
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("name", "words"), [("nowhere/d.png", "make the folder"), ("d.xyz", ".png"), ("d", ".png")])
def test_a_damage_figure_that_cannot_be_written_costs_no_work(whole, tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("the model was loaded"))
    assert fails(run("apply", whole, tmp_path / "out", *HEADS, "--damage", tmp_path / name), "--damage", words)


@pytest.mark.parametrize("command", [("eval", "--out"), ("diagnose", "--out")])
def test_an_outcome_that_cannot_be_written_costs_no_work(whole, tmp_path, monkeypatch, command):
    for name in ("model", "skeleton"):
        monkeypatch.setattr(cli_models.Source, name, lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("mine")
    name, option = command
    assert fails(run(name, whole, option, tmp_path), option, "is a folder")
    assert fails(run(name, whole, option, tmp_path / "file" / "new" / "x.json"), option, "file is no folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("lengths", ["0", "1", "64,-64"])
def test_lengths_that_leave_nothing_to_predict_are_one_line(tmp_path, lengths):
    text = tmp_path / "text.txt"
    text.write_text("a text " * 400)
    assert fails(run("eval", "embedded", "--text", text, "--lengths", lengths), "--lengths", "from 2 up")


def test_a_report_in_the_place_of_a_file_costs_no_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a model was run"))
    assert fails(run("compare", "embedded", "embedded", "--out", tmp_path / "file"), "is a file", "wanted a folder")


def test_a_line_of_json_ends_at_a_newline_alone(tmp_path):
    """JSON may hold U+2028 and its like as they are."""
    file = tmp_path / "text.jsonl"
    texts = ["one\u2028two\x85three", "four"]
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert cli_text.read(file) == texts


@pytest.mark.parametrize("text", ["null", "7", '["a"]'])
def test_a_document_that_is_no_text_is_named(tmp_path, text):
    """It was read as the word None."""
    (tmp_path / "text.jsonl").write_text(f'{{"text": {text}}}\n')
    with pytest.raises(AttnPatchError, match=r"text\.jsonl:1: its text is .*wanted UTF-8 text, or JSON lines"):
        cli_text.read(tmp_path / "text.jsonl")


def test_no_document_at_all_is_too_little(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n")
    with pytest.raises(AttnPatchError, match="0 tokens are 0 windows of 8, wanted 4"):
        cli_text._windows(cli_text.read(file), embedded.load_tokenizer(), 4, 8, file)
