"""OUT: what may be replaced, and what stands there however a run ends."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from test_cli import fails, run

from hf_attnpatch import cli
from hf_attnpatch.commands import models as cli_models
from hf_attnpatch.commands import place, replacing
from hf_attnpatch.errors import AttnPatchError

HEADS = ("-p", "grouped_query:num_kv_heads=2,method=first")
CLI = (sys.executable, "-m", "hf_attnpatch.cli")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


def checkpoint(folder, mark="old"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "mark": mark}))
    (folder / "model.safetensors").write_text(mark)
    return folder


def build(target, mark="new", overwrite=True, then=lambda: None):
    with replacing.replacing(target, overwrite) as folder:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "mark": mark}))
        (folder / "model.safetensors").write_text(mark)
        then()


def held(folder):
    """What a whole checkpoint is of; fails for half of one."""
    marks = {json.loads((folder / "config.json").read_text())["mark"], (folder / "model.safetensors").read_text()}
    assert len(marks) == 1, marks
    assert len(list(folder.iterdir())) == 2
    return marks.pop()


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# -- what --overwrite replaces -----------------------------------------------------------------------------------------


def thesis(out):
    out.mkdir()
    (out / "chapter1.tex").write_text("years of work")


def repository(out):
    checkpoint(out)
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref")


def notes_beside_weights(out):
    checkpoint(out)
    (out / "lab_book.md").write_text("what I saw")


def training_run(out):
    checkpoint(out)
    (out / "optimizer.pt").write_text("days")


def another_config(out):
    out.mkdir()
    (out / "config.json").write_text('{"port": 80}')


def broken_config(out):
    out.mkdir()
    (out / "config.json").write_text("[" * 100_000)


def weights_alone(out):
    out.mkdir()
    (out / "model.safetensors").write_text("mine")


def plain_file(out):
    out.write_text("mine")


def link_to_a_checkpoint(out):
    out.symlink_to(checkpoint(out.parent / "elsewhere"))


def dangling_link(out):
    out.symlink_to(out.parent / "nowhere")


WORDS = {
    thesis: "holds chapter1.tex, which is no part of a checkpoint",
    repository: "holds .git",
    notes_beside_weights: "holds lab_book.md",
    training_run: "holds optimizer.pt",
    another_config: "no config.json of a model",
    broken_config: "no config.json of a model",
    weights_alone: "no config.json of a model",
    plain_file: "is a file",
    link_to_a_checkpoint: "is a link to",
    dangling_link: "is a link to",
}


@pytest.mark.parametrize("make", WORDS, ids=lambda make: make.__name__)
def test_overwrite_replaces_checkpoints_and_nothing_else(source, tmp_path, monkeypatch, make):
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("work was done"))
    make(tmp_path / "out")
    before = everything(tmp_path)
    assert fails(run("apply", source, tmp_path / "out", *HEADS, "--overwrite"), WORDS[make])
    assert everything(tmp_path) == before


@pytest.mark.parametrize("out", [".", "..", "../.."])
def test_the_current_folder_and_its_parents_are_never_replaced(source, tmp_path, monkeypatch, out):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert fails(run("apply", source, out, *HEADS, "--overwrite"), "current folder")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_mount_point_costs_no_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("work was done"))
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    assert fails(run("apply", source, tmp_path / "out", *HEADS), "is a mount point")


@pytest.mark.parametrize("option", ["--plan", "--calibration", "--damage"])
def test_what_a_command_reads_or_writes_inside_out_is_not_deleted(source, tmp_path, monkeypatch, option):
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("work was done"))
    out = checkpoint(tmp_path / "out")
    file = out / ("d.png" if option == "--damage" else "tokenizer.json")
    file.write_text("[{patch: grouped_query, num_kv_heads: 2}]")
    monkeypatch.setattr("hf_attnpatch.commands.text.with_text", lambda patches, *_: patches)
    before = everything(tmp_path)
    assert fails(run("apply", source, out, *HEADS, option, file, "--overwrite"), f"holds {option}")
    assert everything(tmp_path) == before


def test_search_rope_looks_before_it_searches(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_models.Source, "model", lambda _: pytest.fail("work was done"))
    thesis(tmp_path / "out")
    command = ("search-rope", source, "--target", "512", "--data", tmp_path / "out" / "chapter1.tex")
    assert fails(run(*command, "--out", tmp_path / "out", "--overwrite"), "holds --data")
    (tmp_path / "text.txt").write_text("text")
    command = ("search-rope", source, "--target", "512", "--data", tmp_path / "text.txt")
    assert fails(run(*command, "--out", tmp_path / "out", "--overwrite"), "holds chapter1.tex")
    assert (tmp_path / "out" / "chapter1.tex").read_text() == "years of work"


# -- room --------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_found_before_the_work(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("hf_attnpatch.api.apply", lambda *_: pytest.fail("work was done"))
    assert fails(run("apply", source, tmp_path / "out", *HEADS), "GB are free there")
    assert not list(tmp_path.iterdir())


def test_the_room_that_is_asked_for_is_what_is_written(source, tmp_path):
    model = tiny_model("llama")
    written = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert written * 0.9 < cli_models.size_of(model) < written * 1.1
    assert cli_models.size_of(tiny_model("llama", tie_word_embeddings=True)) < cli_models.size_of(model)


def test_a_write_that_fails_is_one_line_and_leaves_nothing(source, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [*CLI, "apply", str(source), str(tmp_path / "out"), *HEADS]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("attnpatch: ")]
    assert len(ours) == 1, done.stderr
    assert "cannot be written" in ours[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# -- what happens meanwhile --------------------------------------------------------------------------------------------


@pytest.fixture(params=["exchanged", "moved"])
def way(request, monkeypatch):
    """Both ways of swapping two folders: in one step, and where the system cannot."""
    if request.param == "moved":
        monkeypatch.setattr(replacing, "_exchanged", lambda *_: False)
    return request.param


def kept(error):
    return Path(str(error.value).rsplit("the new checkpoint is ", 1)[1].rstrip("."))


def test_the_new_folder_takes_the_place_of_the_old(way, tmp_path):
    for mark in ("first", "second"):
        build(tmp_path / "out", mark)
        assert held(tmp_path / "out") == mark
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_left_alone(way, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AttnPatchError, match="left alone") as error:
        build(out, overwrite=False, then=lambda: thesis(out))
    assert (out / "chapter1.tex").read_text() == "years of work"
    assert held(kept(error)) == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("appear", [plain_file, dangling_link], ids=lambda make: make.__name__)
def test_a_file_or_a_link_that_appears_meanwhile_is_left_alone(tmp_path, appear):
    out = tmp_path / "out"
    with pytest.raises(AttnPatchError, match="left alone") as error:
        build(out, overwrite=False, then=lambda: appear(out))
    assert os.path.lexists(out)
    assert not out.is_dir()
    assert held(kept(error)) == "new"


@pytest.mark.parametrize("change", ["added", "edited", "another"])
def test_a_checkpoint_that_changes_meanwhile_is_left_alone(way, tmp_path, change):
    out = checkpoint(tmp_path / "out")

    def meanwhile():
        if change == "added":
            (out / "lab_book.md").write_text("what I saw")
        elif change == "edited":
            (out / "config.json").write_text("mine")
        else:
            out.rename(tmp_path / "moved")
            checkpoint(out, "another")

    with pytest.raises(AttnPatchError, match="left alone") as error:
        build(out, then=meanwhile)
    assert held(kept(error)) == "new"
    found = {"added": "lab_book.md", "edited": "config.json", "another": "model.safetensors"}[change]
    assert (out / found).read_text() == {"added": "what I saw", "edited": "mine", "another": "another"}[change]
    assert not list(tmp_path.glob(".*"))


def test_an_error_leaves_what_was_there(tmp_path):
    checkpoint(tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path / "out", then=lambda: 1 / 0)
    assert everything(tmp_path) == before


def test_the_umask_is_honoured(tmp_path):
    before = os.umask(0o027)
    try:
        build(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


# -- killed ------------------------------------------------------------------------------------------------------------


def kill_at(number, target):
    """Build in a child that is killed at a line of the module; returns the lines that it would have run."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def local(frame, event, _):
            seen[0] += event == "line"
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return local

        sys.settrace(lambda frame, *_: local if frame.f_code.co_filename == replacing.__file__ else None)
        build(target)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_any_line_the_old_or_the_new_is_whole_and_the_next_run_clears_up(way, tmp_path):
    number, killed, seen = 0, True, set()
    while killed:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint(folder / "out")
        killed = kill_at(number, folder / "out") == -signal.SIGKILL
        if way == "exchanged":  # at every moment something whole stands there
            seen.add(held(folder / "out"))
        for hidden in folder.glob(".out*"):  # made longer ago than a run takes to lock it
            os.utime(hidden, (0, 0))
        replacing.clear_dead(folder)
        seen.add(held(folder / "out"))
        assert [path.name for path in folder.iterdir()] == ["out"], number
    assert number > 30
    assert seen == {"old", "new"}


def test_a_run_that_is_alive_keeps_its_folder(tmp_path):
    def meanwhile():
        (alive,) = tmp_path.glob(".one.*")
        os.utime(alive, (0, 0))
        build(tmp_path / "two", then=lambda: None)
        assert (alive / "new").is_dir()

    build(tmp_path / "one", then=meanwhile)
    assert held(tmp_path / "one") == held(tmp_path / "two") == "new"


def test_hidden_folders_of_others_stay(tmp_path):
    for name in (".out.x_7_9xab", ".out.attnpatch-short", ".config", ".out.attnpatch-abcdefgh", ".cache"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.attnpatch-abcdefgh" / "work.txt").write_text("mine")
    (tmp_path / ".a.attnpatch-abcdefgh").write_text("a file")
    (tmp_path / ".b.attnpatch-abcdefgh").symlink_to(tmp_path / ".cache")
    (tmp_path / ".c.attnpatch-abcdefgh").mkdir()  # just made, not locked yet
    before = everything(tmp_path)
    replacing.clear_dead(tmp_path)
    assert everything(tmp_path) == before


def test_what_was_moved_aside_is_not_put_over_what_came_since(tmp_path):
    aside = tmp_path / ".out.attnpatch-abcdefgh"
    (aside / "new").mkdir(parents=True)
    checkpoint(aside / "old")
    (aside / "lock").write_text("")
    thesis(tmp_path / "out")
    before = everything(tmp_path)
    replacing.clear_dead(tmp_path)
    assert everything(tmp_path) == before


def test_a_signal_whose_exception_a_library_swallows_still_ends_the_run(tmp_path):
    with pytest.raises(SystemExit, match="143"), replacing.ended_by_signals():
        with replacing.replacing(tmp_path / "out", overwrite=False), contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_a_signal_that_a_library_turns_into_an_error_ends_the_run_with_its_code():
    def turned():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            raise ValueError("something broke") from None

    with pytest.raises(SystemExit, match="143"), replacing.ended_by_signals():
        turned()


def test_a_command_within_a_process_leaves_its_handlers_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attnpatch", "--version"])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with pytest.raises(SystemExit):
        cli.main()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before
    with pytest.raises(SystemExit), replacing.ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    with replacing.replacing(tmp_path / "out", overwrite=False) as new:  # the next command is not ended by it
        (new / "config.json").write_text("{}")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_leaves_no_hidden_folder(tmp_path, name, code):
    command = [*CLI, "apply", "embedded", str(tmp_path / "out"), "--patch", "rope_scaling:kind=yarn,factor=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/new")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    stderr = process.communicate()[1]
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


# -- results that are written into a folder or a file ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.md", "report.html", "metrics.json", "retrieval.png"])
def test_compare_writes_over_no_file_but_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a model was run"))
    (tmp_path / name).write_text("mine")
    assert fails(run("compare", "embedded", "embedded", "--out", tmp_path), f"holds {name}, which is no earlier result")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["report.txt", "metrics.json", "model", "demo.html"])
def test_the_demo_writes_over_no_file_but_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("work was done"))
    (tmp_path / name).write_text("mine")
    assert fails(run("demo", "--output", tmp_path), f"holds {name}, which is no earlier result")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["mine", "{}", '{"name": "a package"}', "[" * 100_000, None])
@pytest.mark.parametrize("command", [("eval", "--out"), ("diagnose", "--out")])
def test_a_file_that_is_no_earlier_result_stays(source, tmp_path, monkeypatch, command, content):
    for name in ("model", "skeleton"):
        monkeypatch.setattr(cli_models.Source, name, lambda _: pytest.fail("work was done"))
    file = tmp_path / "package.json"
    if content is None:
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_text(content)
    assert fails(run(command[0], source, command[1], file), "no earlier result of this command")
    assert content is None or file.read_text() == content


def test_results_honour_the_umask(tmp_path):
    from hf_attnpatch.writing import write

    before = os.umask(0o007)
    try:
        write(tmp_path / "new" / "a.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.json").stat().st_mode & 0o777 == 0o660
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
