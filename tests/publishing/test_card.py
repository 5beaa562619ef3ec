"""The card of a model that was compared: tables, figures, metadata; and the licence it must have."""

import pytest
from comparing.metrics import METRICS
from huggingface_hub import ModelCard
from transformers import LlamaConfig

import hf_attnpatch as ap
from hf_attnpatch.comparing import tables
from hf_attnpatch.publishing import card, origin
from hf_attnpatch.publishing.hub import Head, Hub
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


CARD = "---\nlicense: llama3\nlicense_link: LICENSE.txt\ntags: [x]\n---\n"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Asks for the licence of a base model that a Hub shows with this card."""

    def found(text, **options):
        files = {"LICENSE.txt": "terms", "NOTICE": "who", "licensing_notes.py": "", "README.md": text}
        there = {name: content for name, content in files.items() if content is not None}
        for name, content in there.items():
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(Hub, "look", lambda self, name: Head("c", False, tuple(sorted(there))))
        monkeypatch.setattr(origin, "hf_hub_download", lambda name, file, **_: str(tmp_path / file))
        return origin.find(Hub(), "org/base", LlamaConfig(), **{"base_model": None, "license": None, **options})

    return found


def test_the_licence_comes_from_the_base_models_card(base, tmp_path):
    found = base(CARD)
    assert found.card == {"license": "llama3", "license_link": "LICENSE.txt"}
    (tmp_path / "out").mkdir()
    found.copy_licences(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE.txt", "NOTICE"]


def test_a_folder_is_not_looked_into(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "LICENSE.txt").write_text("terms")
    with pytest.raises(ap.AttnPatchError, match="folders are not looked into"):
        origin.find(Hub(), str(tmp_path), LlamaConfig(), base_model=None, license=None)
    found = origin.find(Hub(), str(tmp_path), LlamaConfig(), base_model=None, license="mit")
    assert (found.name, found.shown, list(found.files)) == (None, tmp_path.name, [])


def test_files_of_the_caller_stand_beside_the_model(tmp_path):
    for name in ("LICENSE", "notes.txt", "id_rsa"):
        (tmp_path / name).write_text("terms")
    options = {"base_model": None, "license": "mit"}
    found = origin.find(Hub(), "", LlamaConfig(), **options, license_files=[tmp_path / "LICENSE"])
    assert [file.name for file in found.files] == ["LICENSE"]
    for name in ("notes.txt", "id_rsa"):
        with pytest.raises(ap.AttnPatchError, match="is not called like one"):
            origin.find(Hub(), "", LlamaConfig(), **options, license_files=[tmp_path / name])
    with pytest.raises(ap.AttnPatchError, match="is not there"):
        origin.find(Hub(), "", LlamaConfig(), **options, license_files=[tmp_path / "NOTICE"])


def test_another_licence_leaves_nothing_of_the_old_one(base):
    assert base("---\nlicense: other\nlicense_name: x\nlicense_link: y\n---\n", license="mit").card == {
        "license": "mit"
    }


@pytest.mark.parametrize("text", [None, "# no metadata\n", "---\ntags: [x]\n---\n"])
def test_no_licence_is_no_publication(base, text):
    with pytest.raises(ap.AttnPatchError, match=r"the licence of the base model .* is not known.*license='mit'"):
        base(text)


def test_a_card_that_is_none_is_named(base):
    with pytest.raises(ap.AttnPatchError, match="not a model card"):
        base("---\nlicense: [unclosed\n---\n")


HOSTILE = [
    "license: [mit, gpl]",
    "license: 'mit](javascript:alert(1))'",
    "license: {a: b}",
    "license: mit\nlicense_link: javascript:alert(1)",
    "license: mit\nlicense_link: https://x/) <img src=x onerror=alert(1)>",
    'license: mit\nlicense_name: "a\\n# heading"',
    "license: mit\nlicense_name: '<b>'",
    "license: mit\nlanguage: [en, '<b>']",
    "license: mit\nlanguage: [[en]]",
    "license: mit\npipeline_tag: 'x y'",
    "license: 7",
]


@pytest.mark.parametrize("lines", HOSTILE)
def test_what_a_base_models_card_says_is_carried_over_in_the_form_it_must_have_alone(base, lines):
    with pytest.raises(ap.AttnPatchError, match=r"org/base/README.md: (its \w+ is|not a model card)"):
        base(f"---\n{lines}\n---\n")


def test_a_licence_file_of_gigabytes_is_not_carried_over(base, monkeypatch):
    monkeypatch.setattr(origin, "LARGEST", 3)
    with pytest.raises(ap.AttnPatchError, match=r"org/base/.*wanted at most 3"):
        base(CARD)


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
