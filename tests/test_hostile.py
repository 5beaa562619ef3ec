"""A checkpoint, a plan or a result by somebody who means harm: each attack is tried here, and refused.

What they publish of this machine is in `publishing/test_exfiltration.py`, tasks of lm-eval in `evaluation/`.
"""

import builtins
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from architectures import tiny_model
from test_cli import fails, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast as Fast

import hf_attnpatch as ap
from hf_attnpatch import checkpoint, cli, foreign, patches, record, schema, untrusted
from hf_attnpatch.commands import specs
from hf_attnpatch.patch import internal_fields

EVIL = "import pathlib\npathlib.Path({mark!r}).write_text('code ran')\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole llama, a patched gpt2 that needs the package, and a tokenizer beside each."""
    root = tmp_path_factory.mktemp("made")
    tiny_model("llama").save_pretrained(root / "llama")
    own = tiny_model("gpt2")
    ap.patch_grouped_query(own, num_kv_heads=2, method="mean")
    own.save_pretrained(root / "own")
    spanned = tiny_model("llama")
    ap.patch_self_extend(spanned, group=4)
    spanned.save_pretrained(root / "spanned")
    for name in ("llama", "own"):
        words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        Fast(tokenizer_object=words, unk_token="?").save_pretrained(root / name)
    return root


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """Copies a checkpoint; a question at the prompt fails the test, and so does code that ran."""
    import shutil

    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked at the prompt"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def copied(name):
        return shutil.copytree(made / name, tmp_path / name)

    yield copied
    assert not (tmp_path / "mark").exists(), "code of the checkpoint ran"


def edit(folder, file="config.json", **fields):
    path = folder / file
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **fields}))


def evil(folder, name="evil"):
    """Lays a module beside a checkpoint that leaves a mark when it is imported."""
    code = EVIL.format(mark=str(folder.parent / "mark"))
    (folder / f"{name}.py").write_text(code + "class C: pass\nclass M: pass\nclass T: pass\n")


ENTRIES = ("load", "describe", "plan", "apply", "verify")


def enter(folder, entry):
    """Open a checkpoint by one of the ways that there are; returns the error that a user sees, or None."""
    if entry == "load":
        try:
            ap.load(folder)
        except (ap.AttnPatchError, OSError, ValueError, ImportError) as error:
            return f"{type(error).__name__}: {error}"
        return None
    more = [folder.parent / "out"] if entry == "apply" else []
    patch = ["-p", "grouped_query:num_kv_heads=2"] if entry in ("plan", "apply") else []
    found = run(entry, folder, *more, *patch)
    assert not isinstance(found.exception, Exception) or isinstance(found.exception, SystemExit), found.exception
    return None if found.exit_code == 0 else found.output


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_code_of_an_unknown_architecture_does_not_run_and_nothing_asks(copy, entry):
    folder = copy("llama")
    evil(folder)
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit(folder, model_type="nothing", auto_map=maps)
    assert "trust_remote_code" in enter(folder, entry).replace("--trust-remote-code", "trust_remote_code")


def test_code_beside_a_known_architecture_does_not_run(copy):
    folder = copy("llama")
    evil(folder)
    edit(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert enter(folder, "load") is None
    assert type(ap.load(folder)).__name__ == "LlamaForCausalLM"


def test_code_of_a_tokenizer_does_not_run(copy):
    folder = copy("llama")
    evil(folder)
    edit(folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", None]})
    with pytest.raises(ValueError, match="trust_remote_code"):
        checkpoint.tokenizer_of(str(folder))
    assert fails(run("apply", folder, folder.parent / "out", "-p", "grouped_query:num_kv_heads=2"), "cannot be loaded")


def test_the_loader_beside_a_patched_checkpoint_is_not_run(copy):
    folder = copy("own")
    evil(folder, foreign.STUB)
    assert enter(folder, "load") is None


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_that_is_a_repository_is_not_fetched(copy, key, entry):
    folder = copy("llama")
    edit(folder, **{key: "mallory/attention@main:run"})
    assert "a repository whose code would run" in enter(folder, entry)


def test_nor_one_inside_another_config(copy):
    folder = copy("llama")
    for inner in (
        {"attn_implementation": {"": "mallory/attention"}},
        {"_attn_implementation": "paged|mallory/attention"},
    ):
        edit(folder, text_config=inner)
        assert "a repository whose code would run" in enter(folder, "load")


def test_nor_where_the_caller_chooses_another(copy):
    """transformers looks at the config's own all the same."""
    folder = copy("llama")
    edit(folder, _attn_implementation="mallory/attention")
    with pytest.raises(ap.AttnPatchError, match="a repository whose code would run"):
        ap.load(folder, attn_implementation="sdpa")


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (exec, (EVIL.format(mark=self.mark),))


def test_weights_that_are_a_pickle_run_nothing(copy):
    folder = copy("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(folder.parent / "mark"))))
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported|pickle"):
        ap.load(folder)


NAMES = [
    "Trainer",
    "pipeline",
    "os.system",
    "__class__",
    "models",
    "modeling_gpt2",
    "GPT2Config",
    "",
    "é",
    "x" * 10_000,
]


@pytest.mark.parametrize("name", NAMES)
def test_architectures_reach_models_of_the_family_and_nothing_else(copy, name):
    folder = copy("own")
    edit(folder, architectures=[name])
    before = set(sys.modules)
    with pytest.raises(ap.AttnPatchError, match="no Auto class of the installed transformers gives it"):
        ap.load(folder)
    assert not {m for m in set(sys.modules) - before if m.startswith("transformers") and "gpt2" not in m}


@pytest.mark.parametrize("value", ["GPT2LMHeadModel", [1], [None], [["GPT2LMHeadModel"]], {"a": 1}, 7])
def test_architectures_of_another_type_are_a_clear_error(copy, value):
    folder = copy("own")
    edit(folder, architectures=value)
    with pytest.raises(ap.AttnPatchError, match="architectures in config.json is .*; wanted a list of class names"):
        ap.load(folder)


# -- what a record or a plan may say -----------------------------------------------------------------------------------


def recorded(folder, **spec):
    config = json.loads((folder / "config.json").read_text())
    config["attnpatch"]["patches"][0].update(spec)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_record_holds_no_kernel_of_a_repository(copy):
    folder = copy("own")
    config = json.loads((folder / "config.json").read_text())
    config["attnpatch"]["patches"].append({"patch": "flash", "backend": "mallory/attention", "stock": False})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ap.AttnPatchError, match="flash: stands in no record"):
        ap.load(folder)


PATCHES = [getattr(patches, name) for name in patches.__all__]


def test_a_plan_names_no_kernel_of_a_repository_unless_trusted(tmp_path):
    spec = {"patch": "flash", "backend": "mallory/attention"}
    (tmp_path / "plan.yaml").write_text(json.dumps([spec]))
    for refused in (lambda: ap.from_spec(spec), lambda: specs.patches(tmp_path / "plan.yaml", [])):
        with pytest.raises(ap.AttnPatchError, match=r"a repository whose code would run.*--trust-remote-code"):
            refused()
    flash = patches.Flash(backend="mallory/attention")  # whoever writes this has chosen it
    assert specs.patches(tmp_path / "plan.yaml", [], trusted=True) == [flash]
    assert specs.patches(None, ["flash:backend=mallory/attention"]) == [flash]


INTERNAL = [(cls.name, field) for cls in PATCHES for field in internal_fields(cls)]


@pytest.mark.parametrize(("name", "field"), INTERNAL)
def test_what_the_package_finds_out_is_in_no_plan(name, field, tmp_path):
    needed = {"segment_recurrence": {"segment_length": 4, "memory_length": 4}, "position_table": {"length": 8}}
    given = {"kind": "yarn", "factor": 2} if name == "rope_scaling" else needed.get(name, {})
    spec = {"patch": name, **given}
    assert ap.from_spec(spec)
    with pytest.raises(ap.AttnPatchError, match=f"{field} is found out by this package"):
        ap.from_spec({**spec, field: True})
    with pytest.raises(ap.AttnPatchError, match=f"{field} is found out by this package"):
        specs.patches(None, [f"{name}:{field}=true"])
    (tmp_path / "plan.yaml").write_text(json.dumps([{**spec, field: {"a": ["b", "c", True, 1]}}]))
    with pytest.raises(ap.AttnPatchError, match=f"{field} is found out by this package"):
        specs.patches(tmp_path / "plan.yaml", [])


def test_every_field_that_is_not_the_users_is_known_as_such():
    assert {field for _, field in INTERNAL} == {"proved", "restored"}


@pytest.mark.parametrize("field", ["proved", "restored"])
def test_a_record_does_not_say_what_was_proved(field):
    spec = {"patch": "alibi"} if field == "proved" else {"patch": "rope_scaling", "kind": "yarn", "factor": 2}
    good = {"version": 1, "base_model": "x", "base_model_type": "llama", "stock": False, "versions": {}}
    with pytest.raises(ap.AttnPatchError, match=f"{field} is found out"):
        record.parse({**good, "patches": [{**spec, field: True}]})


ODD = [
    {f"model.layers.{n}.self_attn": ["model.rotary_emb", "inv_freq", True, 0] for n in (0, 1)},  # another rotation
    {"model.layers.0.self_attn": ["model.rotary_emb", "__class__", False, 0]},
    {"model.layers.99.self_attn": ["os", "environ", False, -1]},
    {"../../x": "\x1b[2J"},
    ["model.layers.0.self_attn"],
    True,
]


@pytest.mark.parametrize("found", ODD, ids=range(len(ODD)))
def test_what_a_record_says_of_rotation_is_not_read(copy, found, tmp_path):
    folder = copy("spanned")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        wanted = ap.load(folder)(ids).logits
    recorded(folder, found=found)
    with pytest.warns(UserWarning, match=r"patches\[0\]\.found is ignored"):
        model = ap.load(folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    model.save_pretrained(tmp_path / "again")
    assert '"found"' not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["hf_attnpatch", "nothing", "", "../gpt2", "x" * 10_000])
def test_the_family_underneath_is_one_that_transformers_knows(copy, kind):
    folder = copy("own")
    config = json.loads((folder / "config.json").read_text())
    config["attnpatch"]["base_model_type"] = kind
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ap.AttnPatchError, match=r"base_model_type|does not know") as error:
        ap.load(folder)
    assert len(str(error.value)) < 500


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["vocab_file", "merges_file", "spm_file", "tokenizer_file"])
def test_a_tokenizer_reads_no_file_that_its_config_names(copy, tmp_path, key):
    secret = tmp_path / "id_rsa"
    secret.write_text("SECRET")
    folder = copy("llama")
    for path in (secret, os.path.relpath(secret)):
        edit(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer", **{key: str(path)})
        with pytest.raises(ap.AttnPatchError, match="no part of the checkpoint"):
            checkpoint.tokenizer_of(str(folder))
    edit(folder, "tokenizer_config.json", **{key: "/not/there/of/whoever/saved/it"})
    assert checkpoint.tokenizer_of(str(folder)) is not None  # as old tokenizers have it


@pytest.mark.parametrize("name", ["../private/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", 7])
def test_weights_lie_beside_their_index(copy, made, name):
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "kept.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ap.AttnPatchError, match="do not lie beside it"):
        ap.load(folder)
    edit(folder, transformers_weights=name)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ap.AttnPatchError, match="do not lie beside it"):
        ap.load(folder)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_adapter_does_not_choose_the_model_underneath(copy, made, entry):
    folder = copy("llama")
    edit(folder, "adapter_config.json", base_model_name_or_path=str(made / "own"), peft_type="LORA")
    assert "is an adapter" in enter(folder, entry)


def test_where_a_model_was_loaded_from_is_what_the_caller_said(copy):
    folder = copy("llama")
    edit(folder, _name_or_path="/etc", name_or_path="/etc")
    assert ap.load(folder).config._name_or_path == str(folder)


def test_a_record_and_a_report_hold_no_path_of_this_machine(copy, tmp_path):
    folder = copy("llama")
    patch = ("-p", "grouped_query:num_kv_heads=2,method=first")
    done = run("apply", folder, tmp_path / "out", *patch)
    assert done.exit_code == 0, done.output
    config = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in config
    found = json.loads(config)["attnpatch"]
    assert found["base_model"] == "./llama"
    assert found["commands"] == ["attnpatch apply llama out --patch grouped_query:num_kv_heads=2,method=first"]


def test_a_report_shows_no_field_that_is_not_the_users():
    model = tiny_model("llama")
    assert "found=" not in str(ap.patch_self_extend(model, group=4))


# -- sizes -------------------------------------------------------------------------------------------------------------


HUGE = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**400},
    {"n_layer": 10**9, "model_type": "gpt2"},
    {"vocab_size": 10**12},
    {"hidden_size": 10**12},
    {"n_positions": 10**12},
    {"num_labels": 10**10},
    {"num_local_experts": 10**9},
    {"max_position_embeddings": 10**12},
    {"text_config": {"num_hidden_layers": 10**9}},
]


@pytest.mark.parametrize("fields", HUGE, ids=str)
@pytest.mark.parametrize("entry", ["load", "describe"])
def test_sizes_that_no_machine_has_cost_no_time(copy, fields, entry):
    folder = copy("llama")
    edit(folder, **fields)
    begin = time.monotonic()
    found = enter(folder, entry)
    assert "wanted" in found
    assert len(found) < 600
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 5_000, '{"a": ' * 50_000, '{"a": NaN}x', "\x00", "\ufeff{}"])
def test_a_config_that_is_no_json_is_a_clear_error(copy, text):
    folder = copy("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises((ap.AttnPatchError, OSError)) as error:
        ap.load(folder)
    assert len(str(error.value)) < 600


def test_a_config_of_gigabytes_is_not_read(copy, monkeypatch):
    monkeypatch.setattr(untrusted, "_SMALL", 100)
    with pytest.raises(ap.AttnPatchError, match="more than 100 bytes"):
        ap.load(copy("llama"))


def laughs(levels, merge=False):
    lines = ["a0: &a0 {x: lol}"] if merge else ["a0: &a0 [lol, lol]"]
    for n in range(1, levels):
        before = f"*a{n - 1}"
        lines.append(f"a{n}: &a{n} " + (f"{{<<: [{before}, {before}]}}" if merge else f"[{before}, {before}]"))
    return "\n".join(lines)


PLANS = {
    "python": "- !!python/object/apply:os.system [touch {mark}]",
    "python, a field": "- {{patch: flash, backend: !!python/name:os.system }}",
    "laughs": laughs(60).replace("{", "{{").replace("}", "}}"),
    "merges": laughs(60, merge=True).replace("{", "{{").replace("}", "}}"),
    "deep": "[" * 10_000,
    "deep, closed": "[" * 5_000 + "]" * 5_000,
    "digits": "- {{patch: grouped_query, num_kv_heads: " + "9" * 5_000 + "}}",
    "large number": "- {{patch: self_extend, target: 1" + "0" * 400 + "}}",
    "infinite": "- {{patch: rope_scaling, kind: yarn, factor: .inf}}",
    "none": "- {{patch: rope_scaling, kind: yarn, factor: .nan}}",
    "date": "- {{patch: rope_scaling, kind: 2020-01-01, factor: 2}}",
    "bytes": "- {{patch: rope_scaling, kind: !!binary aGVsbG8=, factor: 2}}",
    "set": "- {{patch: rope_scaling, kind: !!set {{a}}, factor: 2}}",
    "keys": "- {{1: 2, patch: flash}}",
    "long": "- {{patch: flash, backend: " + "x" * 100_000 + "}}",
    "cut": "- {{patch: flash",
    "controls": '- {{patch: "\\x1b[2J\\x1b]0;owned\\a"}}',
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_means_harm_is_one_short_line(tmp_path, case):
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLANS[case].format(mark=tmp_path / "mark"))
    begin = time.monotonic()
    found = run("plan", "embedded", "--plan", plan)
    assert fails(found)
    assert len(found.stderr) < 2000
    assert "\x1b" not in found.stderr
    assert time.monotonic() - begin < 20
    assert not (tmp_path / "mark").exists()


def test_a_plan_of_megabytes_is_not_read(tmp_path):
    (tmp_path / "plan.yaml").write_text("- {patch: flash}\n" * 10_000)
    assert fails(run("plan", "embedded", "--plan", tmp_path / "plan.yaml"), "more than")


# -- a tensor that is not there ----------------------------------------------------------------------------------------


def without(folder, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LACKING = [
    ("llama", "model.layers.1.mlp.up_proj.weight"),
    ("llama", "model.embed_tokens.weight"),
    ("llama", "lm_head.weight"),
    ("llama", "model.norm.weight"),
    ("own", "transformer.h.0.attn.c_attn.weight"),
    ("own", "transformer.h.1.mlp.c_fc.bias"),
    ("spanned", "model.layers.0.self_attn.q_proj.weight"),
]


@pytest.mark.parametrize(("name", "tensor"), LACKING)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(copy, name, tensor):
    folder = copy(name)
    without(folder, tensor)
    with pytest.raises(ap.AttnPatchError, match=rf"lacks {tensor.rsplit('.', 2)[0]}.*random numbers"):
        ap.load(folder)
    found = run("apply", folder, folder.parent / "out", "-p", "rope_scaling:kind=yarn,factor=2")
    assert found.exit_code == 1
    assert not (folder.parent / "out").exists()


def test_a_tensor_under_another_name_is_missed(copy):
    from safetensors.torch import load_file, save_file

    folder = copy("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.renamed"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ap.AttnPatchError, match=r"lacks model\.norm\.weight"):
        ap.load(folder)


def test_tied_weights_are_not_missed(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert ap.load(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()


def test_numbers_that_are_none_are_found_before_patching(copy):
    from safetensors.torch import load_file, save_file

    folder = copy("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] = float("nan")  # in a row that no probe touches
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = run("apply", folder, folder.parent / "out", "-p", "rope_scaling:kind=yarn,factor=2")
    assert fails(found, "model.embed_tokens.weight", "not finite")


# -- where text is shown -----------------------------------------------------------------------------------------------


def test_nothing_of_a_checkpoint_acts_on_the_terminal(copy):
    folder = copy("own")
    config = json.loads((folder / "config.json").read_text())
    config["attnpatch"]["base_model_type"] = "\x1b[31mred\x07\u202e"
    config["architectures"] = ["\x1b]0;owned\x07"]
    (folder / "config.json").write_text(json.dumps(config))
    for entry in ENTRIES[1:]:
        found = enter(folder, entry)
        assert not {"\x1b", "\x07", "\u202e"} & set(found)


def test_what_transformers_logs_of_a_config_does_not_act_either(copy):
    folder = copy("llama")
    edit(folder, rope_parameters={"rope_type": "\x1b]0;owned\x07", "rope_theta": 1e4})
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("transformers").addHandler(handler)
    try:
        enter(folder, "describe")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert "\\x1b]0;owned\\x07" in stream.getvalue()  # it was quoted, so the test sees what it looks for
    assert not {"\x1b", "\x07"} & set(stream.getvalue())


def test_a_traceback_does_not_act_either(monkeypatch, capsys):
    secret = "hf_" + "a" * 30
    monkeypatch.setattr(cli, "app", lambda **_: (_ for _ in ()).throw(RuntimeError(f"\x1b[2J {secret}")))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as raised:
        cli.main()
    sys.excepthook(raised.type, raised.value, raised.tb)  # as Python does at its end
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "RuntimeError" in shown
    assert "\x1b" not in shown
    assert secret not in shown


@pytest.mark.parametrize("dtype", ["\x1b[2J", "os", "Tensor", "load", ["float32"], {"": "float32"}, 3])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_is_one_of_torchs(copy, key, dtype):
    folder = copy("llama")
    edit(folder, **{key: dtype})
    with pytest.raises(ap.AttnPatchError, match="wanted a dtype of torch") as error:
        ap.load(folder)
    assert "\x1b" not in str(error.value)


def test_a_folder_whose_name_is_an_escape_is_named_harmlessly(tmp_path):
    found = run("describe", tmp_path / "\x1b[2J")
    assert found.exit_code == 1
    assert "\x1b" not in found.output
    assert "\\x1b[2J" in found.output


def test_stdin_is_never_read(made, tmp_path):
    """As a user runs it: a terminal that would answer yes."""
    import shutil

    folder = shutil.copytree(made / "llama", tmp_path / "llama")
    evil(folder)
    edit(folder, model_type="nothing", auto_map={"AutoConfig": "evil.C"})
    command = [sys.executable, "-m", "hf_attnpatch.cli", "describe", str(folder)]
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True)
    assert done.returncode == 1
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "mark").exists()


def test_schema_says_where_and_what():
    with pytest.raises(ap.AttnPatchError, match=r"a\.b is an integer of 1329 bits; wanted an integer that 64"):
        schema.plain({"b": 10**400}, "a")
