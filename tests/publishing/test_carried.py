"""A push holds what the checkpoint held: tensors that no class loads, other dtypes; and a tokenizer of the length."""

import json

import pytest
import torch
from architectures import tiny_model
from hub_server import Hub
from publishing.clients import TOKEN, run
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast as Fast

import hf_attnpatch as ap
from hf_attnpatch.rewriting.carrying import carry_read

MTP = "model.layers.2.mtp.weight"

PUSH = """
import hf_attnpatch as ap
from hf_attnpatch.checkpoint import tokenizer_of
from hf_attnpatch.cli import app
from typer.testing import CliRunner

base, patched = sys.argv[1:3]
model, own = ap.load(base), tokenizer_of(base)
ap.patch_rope_scaling(model, kind="yarn", factor=4.0)
said["python"] = attempt(lambda: ap.push_to_hub(model, "me/python", tokenizer=own, license="mit"))
said["own"] = own.model_max_length
said["command"] = CliRunner().invoke(app, ["push", patched, "me/command", "--license", "mit"]).output
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.float() * 1.0001 if "norm" in name else t for name, t in tensors.items()}
    save_file({**tensors, MTP: torch.randn(8, 8)}, folder / "model.safetensors", {"format": "pt"})
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    Fast(tokenizer_object=words, unk_token="?", model_max_length=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def patched(base, tmp_path_factory):
    """A checkpoint that `apply` wrote, beside a tokenizer that nobody lengthened."""
    folder = tmp_path_factory.mktemp("patched")
    model = ap.load(base)
    ap.patch_rope_scaling(model, kind="yarn", factor=4.0)
    model.save_pretrained(folder)
    carry_read(model, folder)
    ap.checkpoint.tokenizer_of(str(base)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pushed(base, patched, tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        said, _ = run(hub, tmp_path_factory.mktemp("home"), PUSH, base, patched)
        yield said, hub


@pytest.mark.parametrize("way", ["python", "command"])
def test_every_tensor_and_the_length_are_pushed(pushed, base, way):
    said, hub = pushed
    assert "carried over" in str(said[way]), said
    files = hub.files(f"me/{way}")
    found, wanted = load(files["model.safetensors"]), load_file(base / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 512
    assert "tokenizer: model_max_length 128 -> 512" in str(said[way])
    assert said["own"] == 128  # the caller's own is not touched


def written(model, folder):
    model.save_pretrained(folder)
    carry_read(model, folder)
    return load_file(folder / "model.safetensors")


def test_what_was_trained_or_cast_stays_so(base, tmp_path):
    model = ap.load(base)
    trained = model.model.layers[0].input_layernorm.weight
    torch.nn.init.constant_(trained, 3.0)
    found = written(model, tmp_path / "trained")
    assert torch.equal(found["model.layers.0.input_layernorm.weight"], trained)
    assert found["model.layers.1.input_layernorm.weight"].dtype == torch.float32
    found = written(model.half(), tmp_path / "cast")
    assert {t.dtype for name, t in found.items() if name != MTP} == {torch.float16}
    assert MTP in found


def test_a_model_that_load_did_not_read_is_left_alone(tmp_path):
    model = tiny_model("llama")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = written(model, tmp_path / "out")
    assert all(torch.equal(found[name], before[name]) for name in found)


def test_a_record_says_which_contexts_a_model_had():
    model = tiny_model("llama")
    ap.patch_rope_scaling(model, kind="linear", factor=2.0)
    ap.patch_grouped_query(model, num_kv_heads=2)
    report = ap.patch_rope_scaling(model, kind="linear", factor=2.0)
    assert ap.record.read(model.config).contexts == (128, 256, 512)
    report.revert()
    assert ap.record.read(model.config).contexts == (128, 256)


@pytest.mark.parametrize("contexts", [[0, 5], [-1], [1 << 40], ["128"], [True], [1] * 65, 128])
def test_contexts_of_a_record_are_numbers_of_tokens(contexts):
    good = {"version": 1, "patches": [], "base_model": "x", "base_model_type": "llama", "stock": True, "versions": {}}
    assert ap.record.parse({**good, "contexts": [128, 512]}).contexts == (128, 512)
    with pytest.raises(ap.AttnPatchError, match="contexts"):
        ap.record.parse({**good, "contexts": contexts})
