"""What a command that writes a checkpoint carries over, says, reads again, and refuses."""

import json
import shutil

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file
from test_cli import fails, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

import hf_attnpatch as ap
from hf_attnpatch.commands import models as cli_models
from hf_attnpatch.commands import rewriting
from hf_attnpatch.rewriting.carrying import Kept, carry
from hf_attnpatch.rewriting.files import alike, weights_of

CONFIG_ONLY = ("-p", "rope_scaling:kind=yarn,factor=2")
HEADS = ("-p", "grouped_query:num_kv_heads=2,method=mean")
MTP = "model.layers.9.mtp.weight"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A bf16 llama with fp32 norms that bf16 cannot hold, and a tensor that its class does not know."""
    folder = tmp_path_factory.mktemp("mixed") / "llama"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.float() * 1.0001 if "norm" in name else t for name, t in tensors.items()}
    tensors[MTP] = torch.randn(8, 8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def held(folder):
    found = weights_of(folder)
    return {name: found[name] for name in found.files}


def differing(one, other):
    one, other = held(one), held(other)
    return {
        name for name in {*one, *other} if name not in one or name not in other or not alike(one[name], other[name])
    }


def in_shards(source, folder, size=20_000):
    """Write a checkpoint of one file as several, as they are on the Hub."""
    shutil.copytree(source, folder)
    tensors, shards = load_file(folder / "model.safetensors"), [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) > size:
            shards.append({})
        shards[-1][name] = tensor
    names = {}
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})
        names |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()
    return folder


def in_a_bin(source, folder):
    shutil.copytree(source, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("form", [lambda source, _: source, in_shards, in_a_bin])
def test_a_patch_of_the_config_leaves_every_byte_of_the_weights(mixed, tmp_path, form):
    source = form(mixed, tmp_path / "source")
    done = run("apply", source, tmp_path / "out", *CONFIG_ONLY)
    assert done.exit_code == 0, done.output
    assert differing(source, tmp_path / "out") == set()
    assert f"carried over, though the model's class does not load them: {MTP}" in done.output
    assert "carried over as they were" in done.output
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_a_patch_changes_the_tensors_that_it_owns_and_no_other(mixed, tmp_path):
    done = run("apply", mixed, tmp_path / "out", *HEADS)
    assert done.exit_code == 0, done.output
    changed = differing(mixed, tmp_path / "out")
    assert changed
    assert all("k_proj" in name or "v_proj" in name for name in changed), changed


def test_shards_are_carried_over_beside_the_new_ones(mixed, tmp_path):
    model = LlamaForCausalLM.from_pretrained(mixed)
    kept = Kept(model)
    ap.apply(model, ap.RopeScaling(kind="yarn", factor=2))
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    carry(weights_of(mixed), tmp_path, kept.replaced(model), {MTP}, "source")
    assert differing(mixed, tmp_path) == set()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held(tmp_path).values())
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_dtype_that_was_asked_for_is_the_one_of_all_that_is_known(mixed, tmp_path):
    done = run("apply", mixed, tmp_path / "out", *CONFIG_ONLY, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    found = held(tmp_path / "out")
    assert {t.dtype for name, t in found.items() if name != MTP} == {torch.float16}
    assert found[MTP].dtype == torch.float32  # nobody knows what may be done with it
    assert "written in float16, as asked" in done.output


def test_names_without_the_prefix_of_the_head_are_found_by_their_bytes(tmp_path):
    """GPT-2's own checkpoint is of the base model."""
    tiny_model("gpt2").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    bare = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file, {"format": "pt"})
    for name, patches in (("a", HEADS), ("b", ("-p", "no_position")), ("c", ("-p", "position_table:length=200"))):
        done = run("apply", tmp_path / "in", tmp_path / name, *patches)
        assert done.exit_code == 0, done.output
        assert "h.0.attn.bias" in held(tmp_path / name)
        assert "other pieces" not in done.output


@pytest.mark.parametrize("model_type", ["mixtral", "bert", "phi3", "qwen3_next", "t5"])
def test_families_whose_names_are_converted_are_carried_over(model_type, tmp_path):
    try:
        tiny_model(model_type).save_pretrained(tmp_path / "in")
    except KeyError:
        pytest.skip("no such architecture in this release")
    done = run("apply", tmp_path / "in", tmp_path / "out", "-p", "grouped_query:num_kv_heads=1,method=first")
    if done.exit_code:
        assert fails(done)  # the patch refuses the family: nothing is written
        return
    changed = differing(tmp_path / "in", tmp_path / "out")
    assert changed
    assert all("att" in name.lower() for name in changed), changed


def test_numbers_that_changed_by_nobodys_wish_are_refused(mixed, tmp_path, monkeypatch):
    """As fp8 and MXFP4 checkpoints do, on releases that read them wrong."""
    load = cli_models.Source.model_with_info

    def wrong(source):
        model, info = load(source)
        model.model.layers[1].mlp.up_proj.weight.data.mul_(2)
        return model, info

    monkeypatch.setattr(cli_models.Source, "model_with_info", wrong)
    done = run("apply", mixed, tmp_path / "out", *CONFIG_ONLY)
    assert fails(done, "model.layers.1.mlp.up_proj.weight", "no patch has touched it")
    assert not any(tmp_path.iterdir())


def test_what_was_written_is_read_again(mixed, tmp_path, monkeypatch):
    carried = rewriting.Rewriting.save

    def damaging(work, *arguments):
        said, folder = carried(work, *arguments), arguments[1]
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"] + 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return said

    monkeypatch.setattr(rewriting.Rewriting, "save", damaging)
    done = run("apply", mixed, tmp_path / "out", *CONFIG_ONLY)
    assert fails(done, "read again", "model.layers.0.mlp.up_proj.weight came back as something else")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_a_quantized_checkpoint_is_not_written_dequantized(mixed, tmp_path, method):
    shutil.copytree(mixed, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}})
    )
    assert fails(run("apply", tmp_path / "in", tmp_path / "out", *CONFIG_ONLY), f"is quantized ({method})")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_no_probe_touches_are_looked_at(mixed, tmp_path, value):
    shutil.copytree(mixed, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] = value
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    assert fails(run("apply", tmp_path / "in", tmp_path / "out", *CONFIG_ONLY), "model.embed_tokens.weight", "finite")


# -- the tokenizer's length --------------------------------------------------------------------------------------------


def tokenizer(length):
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    return Fast(tokenizer_object=words, unk_token="?", model_max_length=length)


@pytest.mark.parametrize(
    ("model_type", "patch", "old", "new"),
    [
        ("llama", "rope_scaling:kind=yarn,factor=2", 128, 256),
        ("llama", "rope_scaling:kind=yarn,factor=2", 100, 100),  # a length of its own
        ("llama", "grouped_query:num_kv_heads=2,method=first", 128, 128),
        ("llama", "self_extend:target=512", 128, 512),
        ("gpt2", "position_table:length=300", 128, 300),
    ],
)
def test_a_longer_context_lengthens_the_tokenizer(tmp_path, model_type, patch, old, new):
    model = tiny_model(model_type)
    assert model.config.max_position_embeddings == 128
    model.save_pretrained(tmp_path / "in")
    tokenizer(old).save_pretrained(tmp_path / "in")
    done = run("apply", tmp_path / "in", tmp_path / "out", "-p", patch)
    assert done.exit_code == 0, done.output
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == new
    assert (f"tokenizer: model_max_length {old} -> {new}" in done.output) == (old != new)


def test_roberta_counts_two_rows_more_than_its_tokenizer(tmp_path):
    model, cut = tiny_model("roberta"), tokenizer(126)
    assert model.config.max_position_embeddings == 128
    report = ap.apply(model, ap.PositionTable(length=254))
    assert report.context == (128, 256)
    assert report.lengthen(cut) == "tokenizer: model_max_length 126 -> 254"


def test_the_report_says_and_offers_it():
    model, cut = tiny_model("llama"), tokenizer(128)
    report = ap.apply(model, ap.RopeScaling(kind="yarn", factor=4))
    assert "context: 128 -> 512 tokens; report.lengthen(tokenizer)" in str(report)
    assert report.lengthen(cut)
    assert cut.model_max_length == 512
    assert report.lengthen(cut) is None
    assert "context:" not in str(ap.plan(model, ap.GroupedQuery(num_kv_heads=2, method="first")))


def test_gpt2_of_the_command_line_is_what_python_writes(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "in")
    assert run("apply", tmp_path / "in", tmp_path / "out", "-p", "position_table:length=200").exit_code == 0
    ap.apply(model, ap.PositionTable(length=200))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.transformer.wpe.weight, model.transformer.wpe.weight)
