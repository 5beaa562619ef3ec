"""The card of a model that was compared: tables, figures, metadata; and the licence it must have."""

import pytest
from comparing.metrics import METRICS
from huggingface_hub import ModelCard
from transformers import LlamaConfig

import hf_attnpatch as ap
from hf_attnpatch.comparing import tables
from hf_attnpatch.publishing import card, origin
from hf_attnpatch.publishing.hub import Hub
from hf_attnpatch.publishing.stale import stale_files
from hf_attnpatch.record import Record

RECORD = Record(({"patch": "grouped_query", "num_kv_heads": 2, "stock": True},), "org/base", "llama", True)
ORIGIN = origin.Origin("org/base", "org/base", {"license": "mit", "pipeline_tag": "text-generation"}, ())


@pytest.fixture
def evaluation(tmp_path):
    metrics = {**METRICS, "patched": {**METRICS["patched"], "name": "user/name"}}
    return ap.Comparison(tmp_path, metrics).for_card(tmp_path / "card", "attnpatch")


def test_table_figures_and_command_of_a_comparison_are_in_the_card(evaluation, tmp_path):
    facts = card.Facts("user/name", RECORD, ORIGIN, "AutoModelForCausalLM", (), evaluation=evaluation)
    text = card.render(facts).content
    assert tables.summary(METRICS) in text
    assert tables.loss_by_length(METRICS) in text
    assert "attnpatch compare A B" in text
    for file in ("loss_by_length.png", "damage_by_layer.png", "retrieval.png", "speed_and_cache.png"):
        assert f"](attnpatch/{file})" in text
        assert (tmp_path / "card" / file).read_bytes().startswith(b"\x89PNG")
    assert {"report.html", "metrics.json"} < {path.name for path in (tmp_path / "card").iterdir()}


def test_the_metadata_hold_the_perplexities(evaluation):
    facts = card.Facts("user/name", RECORD, ORIGIN, "AutoModelForCausalLM", (), evaluation=evaluation)
    data = ModelCard(card.render(facts).content).data
    assert data.model_name == "name"
    found = {result.dataset_config: result.metric_value for result in data.eval_results}
    assert found == {"64": 13.4637, "256": 13.4637}  # e ** 2.6


def test_without_a_comparison_the_card_says_so():
    text = card.render(card.Facts("user/name", RECORD, ORIGIN, "AutoModelForCausalLM", ())).content
    assert "Not measured for this checkpoint. `attnpatch compare org/base user/name` does it." in text


def local(folder, text, license=None, base_model=None):
    folder.mkdir(exist_ok=True)
    if text is not None:
        (folder / "README.md").write_text(text)
    return origin.find(Hub(), str(folder), LlamaConfig(), base_model=base_model, license=license)


def test_the_licence_comes_from_the_card_beside_the_base_model(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("terms")
    (tmp_path / "NOTICE").write_text("who")
    (tmp_path / "licensing_notes.py").write_text("")
    found = local(tmp_path, "---\nlicense: llama3\nlicense_link: LICENSE.txt\ntags: [x]\n---\n")
    assert found.card == {"license": "llama3", "license_link": "LICENSE.txt"}
    assert found.name is None
    found.copy_licences(tmp_path / "out" if (tmp_path / "out").mkdir() else tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE.txt", "NOTICE"]


def test_another_licence_leaves_nothing_of_the_old_one(tmp_path):
    found = local(tmp_path, "---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n", license="mit")
    assert found.card == {"license": "mit"}


@pytest.mark.parametrize("text", [None, "# no metadata\n", "---\ntags: [x]\n---\n"])
def test_no_licence_is_no_publication(tmp_path, text):
    with pytest.raises(ap.AttnPatchError, match=r"the licence of the base model .* is not known.*license='mit'"):
        local(tmp_path, text)


def test_a_card_that_is_none_is_named(tmp_path):
    with pytest.raises(ap.AttnPatchError, match="not a model card"):
        local(tmp_path, "---\nlicense: [unclosed\n---\n")


def test_only_files_of_the_replaced_model_go(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    there = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors", "README.md"]
    there += ["pytorch_model.bin", "adapter_config.json", "attnpatch/old.png", "modeling_hf_attnpatch.py"]
    kept = [
        "notes.txt",
        "onnx/model.onnx",
        "gguf/model.safetensors",
        "tokenizer.json",
        "modeling_other.py",
        "model.gguf",
    ]
    gone = set(stale_files([*there, *kept], tmp_path))
    assert gone == set(there) - {"model.safetensors", "README.md"}
