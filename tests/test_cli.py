"""The command line on tiny checkpoints: what it prints, what it writes, how it fails."""

import json
import re
import sys
import types

import pytest
import torch
import yaml
from architectures import tiny_inputs, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast
from typer.testing import CliRunner

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.cli import app
from hf_attnpatch.commands import specs as cli_specs


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a llama with a tokenizer, a gpt2 and a masked bert."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("llama", "gpt2", "bert"):
        tiny_model(name, encoder=name == "bert").save_pretrained(root / name)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    Fast(tokenizer_object=words, unk_token="?").save_pretrained(root / "llama")
    return root


def fails(result, *words):
    """The run ended with exit code 1 and one line of ours that holds these words, without a traceback."""
    assert result.exit_code == 1, result.output
    ours = [line for line in result.stderr.splitlines() if "%|" not in line and line]  # not transformers' bars
    assert len(ours) == 1, ours
    assert ours[0].startswith("attnpatch: ")
    assert isinstance(result.exception, SystemExit)
    assert all(word in ours[0] for word in words), ours
    return True


def test_help_names_every_verb():
    text = run("--help").output
    assert all(verb in text for verb in ("describe", "plan", "apply", "verify", "demo"))


def test_describe_reads_no_weights(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text((checkpoints / "llama" / "config.json").read_text())
    result = run("describe", tmp_path)
    assert result.exit_code == 0, result.output
    assert "LlamaAttention" in result.output
    assert "rope: default" in result.output


def test_plan_writes_nothing_and_says_what_would_be(checkpoints, tmp_path):
    (tmp_path / "config.json").write_text((checkpoints / "llama" / "config.json").read_text())
    heads, rope = "grouped_query:num_kv_heads=2,method=mean", "rope_scaling:kind=yarn,factor=4"
    result = run("plan", tmp_path, "--patch", heads, "-p", rope)
    assert result.exit_code == 0, result.output
    assert "config.num_key_value_heads" in result.output
    assert "rope: yarn" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("patch", ["alibi", "relative_xl", "rotary", "sinusoidal"])
def test_plan_loads_the_weights_of_what_has_to_be_tried(checkpoints, patch):
    found = run("plan", checkpoints / "gpt2", "--patch", patch)
    assert found.exit_code == 0, found.output
    assert "position tables taken out" in " ".join(found.output.split())


def test_plan_of_flash_loads_the_weights(checkpoints):
    result = run("plan", checkpoints / "llama", "-p", "flash:backend=sdpa")
    assert result.exit_code == 0, result.output
    assert "proved on a probe" in result.output


def test_apply_writes_a_stock_checkpoint_with_its_tokenizer(checkpoints, tmp_path):
    out = tmp_path / "deep" / "out"
    patches = ["--patch", "grouped_query:num_kv_heads=2", "--patch", "rope_scaling:kind=yarn,factor=4"]
    result = run("apply", checkpoints / "llama", out, *patches)
    assert result.exit_code == 0, result.output
    assert "sites called" in result.output
    model = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2), ap.RopeScaling(kind="yarn", factor=4))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == {"a": 0, "b": 1, "?": 2}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_apply_of_a_plan_file(checkpoints, tmp_path):
    plan = tmp_path / "plan.yaml"
    specs = [{"patch": "grouped_query", "num_kv_heads": 1, "method": "first"}]
    plan.write_text(yaml.safe_dump(specs))
    out = tmp_path / "out"
    result = run("apply", checkpoints / "gpt2", out, "--plan", plan, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "no tokenizer in the source" in result.output
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert ap.describe(model).sites[0].num_kv_heads == 1


def test_a_patched_checkpoint_is_patched_again_and_keeps_its_task_head(checkpoints, tmp_path):
    result = run("apply", checkpoints / "bert", tmp_path / "once", "-p", "grouped_query:num_kv_heads=2")
    assert result.exit_code == 0, result.output
    result = run("apply", tmp_path / "once", tmp_path / "twice", "-p", "flash:backend=sdpa")
    assert result.exit_code == 0, result.output
    first, second = (AutoModelForMaskedLM.from_pretrained(tmp_path / n) for n in ("once", "twice"))
    assert torch.equal(logits(first), logits(second))


def test_overwrite_is_asked_for(checkpoints, tmp_path):
    out = tmp_path / "out"
    tiny_model("gpt2").save_pretrained(out)
    arguments = ["apply", checkpoints / "llama", out, "-p", "grouped_query:num_kv_heads=2"]
    assert fails(run(*arguments), "not empty", "--overwrite")
    assert "gpt2" in (out / "config.json").read_text()
    result = run(*arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert "llama" in (out / "config.json").read_text()


def test_a_failure_leaves_out_as_it_was(checkpoints, tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def broken(self, folder, **_):
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", broken)
    arguments = ["apply", checkpoints / "llama", tmp_path / "out", "-p", "grouped_query:num_kv_heads=2", "--overwrite"]
    assert fails(run(*arguments), "disk full")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ([], ["no patch given"]),
        (["-p", "grouped_query:num_kv_heads=3"], ["num_kv_heads from 1, 2, 4"]),
        (["-p", "grouped:num_kv_heads=2"], ["'grouped' does not exist", "grouped_query"]),
        (["-p", "grouped_query:heads=2"], ["no field heads"]),
        (["-p", "grouped_query:2"], ["field=value"]),
        (["-p", "grouped_query"], ["num_kv_heads"]),
        (["-p", "rope_scaling:kind=yarn,factor=[1"], ["as YAML"]),
        (["-p", "flash:backend=flash_attention_2"], ["CUDA"]),
        (["--plan", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_mistakes_are_one_line(checkpoints, tmp_path, patches, words):
    assert fails(run("apply", checkpoints / "llama", tmp_path / "out", *patches), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a: 1", "- 1", "[]", "- patch: [", "- kind: yarn"])
def test_a_plan_that_is_no_list_of_patches_is_one_line(checkpoints, tmp_path, text):
    plan = tmp_path / "plan.yaml"
    plan.write_text(text)
    assert fails(run("plan", checkpoints / "llama", "--plan", plan), "plan.yaml")


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fails(run("describe", tmp_path / "nothing"), "nothing: is not there; wanted the folder of a checkpoint")
    assert fails(run("describe", tmp_path), "cannot be loaded")


def test_an_unknown_architecture_is_one_line(checkpoints, tmp_path):
    text = (checkpoints / "llama" / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForNothing")
    (tmp_path / "config.json").write_text(text)
    assert fails(run("describe", tmp_path), "LlamaForNothing", "architectures")


def test_an_unknown_dtype_is_one_line(checkpoints, tmp_path):
    arguments = ["apply", checkpoints / "llama", tmp_path / "o", "-p", "grouped_query:num_kv_heads=2"]
    assert fails(run(*arguments, "--dtype", "float33"), "float33")


def test_values_are_yaml():
    spec = cli_specs.parse("rope_scaling:kind=longrope,factor=2.0,long_factor=[1, 2,3],attention_factor=null")
    wanted = {"kind": "longrope", "factor": 2.0, "long_factor": [1, 2, 3], "attention_factor": None}
    assert spec == {"patch": "rope_scaling", **wanted}
    (patch,) = cli_specs.patches(None, ["rope_scaling:kind=longrope,factor=2,long_factor=[1,2]"])
    assert patch.long_factor == (1, 2)
    assert cli_specs.parse("flash") == {"patch": "flash"}


def test_verify_passes_and_fails_with_the_exit_code(checkpoints, monkeypatch):
    result = run("verify", checkpoints / "llama")
    assert result.exit_code == 0, result.output
    assert "nothing failed" in result.output
    fake = types.SimpleNamespace(verify=lambda model: types.SimpleNamespace(passed=False))
    monkeypatch.setitem(sys.modules, "hf_attnpatch.verify", fake)
    assert run("verify", checkpoints / "llama").exit_code == 1


def test_demo_runs_into_the_folder(tmp_path, monkeypatch):
    fake = types.SimpleNamespace(run=lambda output: f"ran into {output}")
    monkeypatch.setitem(sys.modules, "hf_attnpatch.demo", fake)
    assert f"ran into {tmp_path / 'demo'}" in run("demo", "--output", tmp_path / "demo").stdout.replace("\n", "")
    told = json.loads(run("demo", "--output", tmp_path / "demo", "--json").stdout)
    assert told["page"] == str(tmp_path / "demo/demo.html")


def test_calibration_text_reaches_the_patch(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(embedded.heldout("python")[0].splitlines()[:400]))
    spec = "grouped_query:num_kv_heads=2,method=refined,refine_steps=2"
    options = ["--calibration", str(text), "--sequences", "10", "--length", "64", "--damage", str(tmp_path / "d.png")]
    done = run("apply", "embedded", str(tmp_path / "out"), "--patch", spec, *options)
    assert done.exit_code == 0, done.output
    assert "refined: error, KL" in done.output
    assert (tmp_path / "d.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out/config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"a few words", "windows of 512, wanted 64"), (b"\xff\xfe", "not UTF-8 text")],
)
def test_calibration_text_that_will_not_do(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    spec = ("-p", "grouped_query:num_kv_heads=2", "--calibration", file)
    done = run("apply", "embedded", tmp_path / "out", *spec)
    assert done.exit_code == 1
    assert re.search(message, done.output)
    assert not (tmp_path / "out").exists()
