"""A patched checkpoint is made from the files of the old one: equal, bit for bit, to patching in memory and saving."""

import json
import os
import shutil
import signal

import pytest
import torch
from architectures import tiny_model
from patches import CASES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import fails, run
from test_rewriting import in_shards

import hf_attnpatch as ap
from hf_attnpatch.commands.models import Source
from hf_attnpatch.commands.rewriting import Rewriting, reread
from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.rewriting import stored
from hf_attnpatch.rewriting.files import INDEX

MEAN = ap.GroupedQuery(num_kv_heads=2, method="mean")
YARN = ap.RopeScaling(kind="yarn", factor=2.0)
LONGER = ap.PositionTable(length=200)
# of each kind of patch one that changes another thing: nothing, the config, tensors, names, the class
PATCHES = {case.name: case.patch for case in CASES}
EVERY = (
    *("grouped_2_mean", "grouped_2_principal", "grouped_2_refined", "rope_yarn", "alibi", "relative_xl", "rotary"),
    *(
        "sinusoidal",
        "no_position",
        "score_temperature",
        "position_table",
        "self_extend",
        "attention_sinks",
        "recurrence",
    ),
)
FAMILIES = ("llama", "gpt2", "bloom", "qwen3", "olmo2", "stablelm", "mistral", "opt", "falcon", "gemma2")


def saved(folder, model_type="llama", size=20_000, **fields):
    model = tiny_model(model_type, **fields).bfloat16()
    model.save_pretrained(folder / "one")
    return in_shards(folder / "one", folder / "in", size)


def applied(source, patch, out, size=None):
    """What `attnpatch apply` does with a folder."""
    work = Rewriting(Source(name=str(source)))
    report = ap.apply(work.model, patch)
    out.mkdir()
    notes = work.save(report, out, "attnpatch apply", size)
    del report
    reread(out, work.release(), Source(name=str(source)))
    return notes


def in_memory(source, patch, out):
    """The same in a script: load, patch, save."""
    model = ap.load(source, dtype="auto")
    ap.apply(model, patch)
    model.save_pretrained(out)


def state(folder):
    return ap.load(folder, dtype="auto").state_dict()


def check_equal(one, other):
    found, wanted = state(one), state(other)
    assert found.keys() == wanted.keys()
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for config in configs:
        config.get("attnpatch", {}).pop("commands", None)
    assert configs[0] == configs[1]


def check(tmp_path, model_type, patch):
    try:
        source = saved(tmp_path, model_type)
        in_memory(source, patch, tmp_path / "wanted")
    except (AttnPatchError, KeyError):
        pytest.skip("refused, or no such family in this release")
    notes = applied(source, patch, tmp_path / "out")
    assert not any("written anew" in note for note in notes), notes
    check_equal(tmp_path / "out", tmp_path / "wanted")
    return source


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_patch_gives_what_it_gives_in_memory(tmp_path, name):
    check(tmp_path, "gpt2" if name == "position_table" else "llama", PATCHES[name])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_what_it_gives_in_memory(tmp_path, model_type):
    check(tmp_path, model_type, MEAN)


def test_files_without_replaced_tensors_are_the_old_ones_and_names_and_metadata_stay(tmp_path):
    source = saved(tmp_path)
    index = json.loads((source / INDEX).read_text())
    (source / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 1, "made_by": "me"}}))
    file = source / "model-0.safetensors"
    save_file(load_file(file), file, {"format": "pt", "note": "kept"})
    applied(source, MEAN, tmp_path / "out")
    shards = {path.name for path in source.glob("*.safetensors")}
    assert shards == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    changed = {name for name in shards if (source / name).read_bytes() != (tmp_path / "out" / name).read_bytes()}
    with_heads = {name for key, name in index["weight_map"].items() if "k_proj" in key or "v_proj" in key}
    assert changed == with_heads
    assert shards - changed
    with safe_open(tmp_path / "out" / "model-0.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "kept"}
    new = json.loads((tmp_path / "out" / INDEX).read_text())
    assert new["metadata"]["made_by"] == "me"
    assert new["metadata"]["total_size"] == sum(t.nbytes for t in state(tmp_path / "out").values())
    assert new["weight_map"] == index["weight_map"]


def test_a_patch_of_the_config_copies_every_file(tmp_path):
    source = saved(tmp_path)
    applied(source, YARN, tmp_path / "out")
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_size_that_is_asked_for_is_honoured(tmp_path):
    source = saved(tmp_path)
    applied(source, MEAN, tmp_path / "out", "60KB")
    in_memory(source, MEAN, tmp_path / "wanted")
    check_equal(tmp_path / "out", tmp_path / "wanted")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert 1 < len(shards) < len(list(source.glob("*.safetensors")))
    assert json.loads((source / INDEX).read_text())["metadata"] == {}


@pytest.mark.parametrize("tied", [False, True])
def test_tied_tables_stay_as_the_files_have_them(tmp_path, tied):
    source = saved(tmp_path, "gpt2", tie_word_embeddings=tied)
    applied(source, LONGER, tmp_path / "out")
    in_memory(source, LONGER, tmp_path / "wanted")
    check_equal(tmp_path / "out", tmp_path / "wanted")
    held = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert ("lm_head.weight" in held) == (not tied)


@pytest.mark.parametrize("why", ["bin", "renamed", "dtype"])
def test_what_cannot_be_made_so_is_written_as_before_and_says_why(tmp_path, why):
    source = saved(tmp_path)
    options = ()
    if why == "bin":
        torch.save(load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "one" / "pytorch_model.bin")
        (tmp_path / "one" / "model.safetensors").unlink()
        source = tmp_path / "one"
    elif why == "renamed":
        tiny_model("mixtral").save_pretrained(tmp_path / "experts")
        source = tmp_path / "experts"
    else:
        options = ("--dtype", "float32")
    done = run("apply", source, tmp_path / "out", "-p", "grouped_query:num_kv_heads=2,method=mean", *options)
    assert done.exit_code == 0, done.output
    assert "all weights were written anew: " in done.output
    assert {"bin": "no safetensors", "renamed": "another name", "dtype": "--dtype"}[why] in done.output


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).half(), "n": torch.tensor(3), "e": torch.zeros(0, 4)}
    tensors |= {"t": torch.ones(2, dtype=torch.bool), "w": torch.randn(4, 4).t(), "ü": torch.randn(2).bfloat16()}
    stored.write(tmp_path / "own", tensors, {"format": "pt"})
    found = load_file(tmp_path / "own")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert stored.holds(tmp_path / "own", tensors, {"format": "pt"})
    pieces = stored.header_of(tmp_path / "own").pieces
    assert all(piece.start % 8 == 0 or piece.dtype.itemsize < 8 for piece in pieces.values())
    stored.write(tmp_path / "again", pieces, {"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "own").read_bytes()
    for place in (3, 40, -1):
        wrong = bytearray((tmp_path / "own").read_bytes())
        wrong[place] ^= 1
        (tmp_path / "own").write_bytes(wrong)
        assert not stored.holds(tmp_path / "own", tensors, {"format": "pt"})


@pytest.mark.parametrize("way", ["system", "none", "refused", "short"])
def test_bytes_are_moved_where_the_system_cannot(tmp_path, monkeypatch, way):
    (tmp_path / "one").write_bytes(os.urandom(1000))
    if way == "none":
        monkeypatch.delattr(os, "copy_file_range")
    elif way == "refused":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(18, "another device")))
    elif way == "short":
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    stored.copy(tmp_path / "one", tmp_path / "two")
    assert stored.same_file(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("damage", ["short", "shorter", "long_header", "no_json", "beyond", "shape", "twice"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(2)}, file)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length]
    other = {
        "no_json": b"{" * length,
        "beyond": head.replace(b"[0,64]", b"[0,99]"),
        "shape": head.replace(b"[4,4]", b"[4,5]"),
        "twice": head.replace(b'"b"', b'"a"'),
    }.get(damage, head)
    cut = {"short": -1, "shorter": 5}.get(damage)
    begin = (1 << 60).to_bytes(8, "little") if damage == "long_header" else data[:8]
    file.write_bytes((begin + other + data[8 + length :])[:cut])
    with pytest.raises(AttnPatchError, match=r"model\.safetensors"):
        stored.header_of(file)


def broken(source, how):
    """Break a checkpoint of shards; return what the error has to name."""
    shard, index = source / "model-1.safetensors", source / INDEX
    listed = json.loads(index.read_text())
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "missing":
        shard.unlink()
    elif how == "elsewhere":
        listed["weight_map"]["lm_head.weight"] = "../one/model.safetensors"
    elif how == "not_there":
        listed["weight_map"]["model.more.weight"] = "model-0.safetensors"
    elif how == "no_list":
        listed = [1]
    elif how == "cut":
        index.write_text(index.read_text()[:50])
        return INDEX
    index.write_text(json.dumps(listed))
    return {"elsewhere": "../one", "no_list": INDEX, "not_there": "model-0.safetensors"}.get(how, "model-1")


@pytest.mark.parametrize("how", ["truncated", "missing", "elsewhere", "not_there", "no_list", "cut"])
def test_a_broken_or_hostile_index_is_one_line_and_leaves_nothing(tmp_path, how):
    source = saved(tmp_path)
    named = broken(source, how)
    (tmp_path / "place").mkdir()
    done = run("apply", source, tmp_path / "place" / "out", "-p", "rope_scaling:kind=yarn,factor=2")
    assert fails(done, named), done.output
    assert not list((tmp_path / "place").iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    source = saved(tmp_path)
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    done = run("apply", source, tmp_path / "place" / "out", "-p", "rope_scaling:kind=yarn,factor=2")
    assert fails(done, "cannot be written: No space left on device")
    assert not list((tmp_path / "place").iterdir())


# -- killed ------------------------------------------------------------------------------------------------------------

YARN_COMMAND = ("-p", "rope_scaling:kind=yarn,factor=2")


def killed_at_copy(number, *command):
    """Run a command in a fork that is killed when it has begun to copy so many files."""
    child = os.fork()
    if child == 0:
        copy, seen = stored.copy, []

        def dying(file, target):
            seen.append(file)
            if len(seen) == number:
                target.write_bytes(file.read_bytes()[:-1000])  # the last is not whole
                os.kill(os.getpid(), signal.SIGKILL)
            copy(file, target)

        stored.copy = dying
        run(*command)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_same_command_goes_on_from_a_run_that_was_killed(tmp_path, monkeypatch):
    source, place = saved(tmp_path), tmp_path / "place"
    place.mkdir()
    command = ("apply", source, place / "out", *YARN_COMMAND)
    assert run(*command).exit_code == 0
    wanted = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    shutil.rmtree(place / "out")
    assert killed_at_copy(4, *command) == -signal.SIGKILL
    (hidden,) = place.iterdir()
    (hidden / "new" / "model-99.safetensors").write_text("not of this checkpoint")
    copied, copy = [], stored.copy
    monkeypatch.setattr(stored, "copy", lambda file, target: copied.append(file.name) or copy(file, target))
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "3 of " in done.output
    assert "from a run that was killed" in done.output
    assert len(copied) == len(list(source.glob("*.safetensors"))) - 3
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == wanted
    assert [path.name for path in place.iterdir()] == ["out"]


def test_another_command_begins_anew_and_removes_what_was_left(tmp_path):
    source, place = saved(tmp_path), tmp_path / "place"
    place.mkdir()
    assert killed_at_copy(2, "apply", source, place / "out", *YARN_COMMAND) == -signal.SIGKILL
    done = run("apply", source, place / "out", "-p", "rope_scaling:kind=yarn,factor=4")
    assert done.exit_code == 0, done.output
    assert "killed" not in done.output
    assert [path.name for path in place.iterdir()] == ["out"]


def test_convert_is_apply_from_python(tmp_path):
    source = saved(tmp_path)
    done = ap.convert(source, tmp_path / "out", MEAN)
    in_memory(source, MEAN, tmp_path / "wanted")
    check_equal(tmp_path / "out", tmp_path / "wanted")
    assert done.saved == tmp_path / "out"
    assert not done.tokenizer
    assert "saved" in str(done)
    assert done.to_dict()["patches"][0]["patch"] == "grouped_query"
    with pytest.raises(AttnPatchError, match="is not empty"):
        ap.convert(source, tmp_path / "out", MEAN)
