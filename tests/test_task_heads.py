"""Classifiers, reward, token classification, question answering and embedding models on patched trunks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures import tiny_config
from patches import CASES
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

import hf_attnpatch as ap
from hf_attnpatch.probe import predicted

PATCHES = [case.patch for case in {case.kind: case for case in reversed(CASES)}.values() if case.patch.recorded]
HEADS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)
IDS = torch.arange(5, 53).view(2, 24)


def built(model_type, auto, labels=3, **changes):
    torch.manual_seed(0)
    config = tiny_config(model_type, num_labels=labels, pad_token_id=0, **changes)
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return [value for value in found.values() if isinstance(value, torch.Tensor)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_a_head_on_a_patched_trunk_loads_with_the_same_outputs(patch, auto, tmp_path):
    model = built("llama", auto)
    plain = outputs(model)
    if isinstance(patch, (ap.ScoreTemperature, ap.Latent)) and auto == "AutoModelForQuestionAnswering":
        with pytest.raises(ap.UnsupportedArchitecture):  # neither ministral3 nor a latent type has such a head
            ap.apply(model, patch)
        return
    stock = ap.apply(model, patch).stock
    wanted = outputs(model)
    assert stock or not same(wanted, plain)
    model.save_pretrained(tmp_path)
    for load in (ap.load, getattr(transformers, auto).from_pretrained):
        again = load(tmp_path).eval()
        assert same(outputs(again), wanted), load
        assert isinstance(again, type(model))
        assert again.config.num_labels == 3
        again.save_pretrained(tmp_path / "again")
        assert same(outputs(ap.load(tmp_path / "again").eval()), wanted)


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "bert", "qwen2", "t5"])
@pytest.mark.parametrize("patch", [ap.GroupedQuery(num_kv_heads=2), ap.Alibi(), ap.RelativeXl()], ids=lambda p: p.name)
def test_other_families(model_type, patch, tmp_path):
    if model_type == "t5" and patch.name != "grouped_query":
        pytest.skip("T5 has a bias of its own")
    model = built(model_type, HEADS[1])
    try:
        ap.apply(model, patch)
    except ap.UnsupportedArchitecture as error:
        pytest.skip(f"refused: {error}")
    wanted = outputs(model)
    model.save_pretrained(tmp_path)
    assert same(outputs(ap.load(tmp_path).eval()), wanted)
    assert same(outputs(getattr(transformers, HEADS[1]).from_pretrained(tmp_path).eval()), wanted)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_language_model_becomes_a_trunk_and_a_classifier_and_a_trunk_a_language_model(model_type, patch, tmp_path):
    model = built(model_type, "AutoModelForCausalLM")
    try:
        stock = ap.apply(model, patch).stock
    except ap.AttnPatchError as error:
        pytest.skip(f"refused: {error}")
    model.save_pretrained(tmp_path / "whole")
    with torch.no_grad():
        wanted = predicted(model.base_model(input_ids=IDS))
        trunk = AutoModel.from_pretrained(tmp_path / "whole").eval()
        assert torch.equal(trunk(input_ids=IDS).last_hidden_state, wanted)
        head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=1).eval()
        assert head.config.num_labels == 1  # a reward model
        assert torch.equal(head.base_model(input_ids=IDS).last_hidden_state, wanted)
        trunk.save_pretrained(tmp_path / "trunk")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "trunk").eval()
        assert torch.equal(again.base_model(input_ids=IDS).last_hidden_state, wanted)
    assert stock == ("Patched" not in type(again.config).__name__)


def test_trusted_code_loads_a_head_where_the_package_is_installed(tmp_path):
    model = built("llama", HEADS[0])
    ap.patch_alibi(model)
    model.save_pretrained(tmp_path / "head")
    torch.save(outputs(model)[0], tmp_path / "logits.pt")
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.{HEADS[0]}.from_pretrained(sys.argv[1] + '/head', trust_remote_code=True).eval()\n"
        "with torch.no_grad():\n"
        "    found = model(input_ids=torch.arange(5, 53).view(2, 24)).logits\n"
        "assert torch.equal(found, torch.load(sys.argv[1] + '/logits.pt'))\n"
    )
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_every_auto_class_that_knows_the_family_knows_its_patched_config():
    model = built("llama", "AutoModel")
    ap.patch_alibi(model)
    config = model.config
    for name in (n for n in modeling_auto.__all__ if n.startswith("AutoModel")):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and type(config).__mro__[2] in mapping:
            assert mapping[type(config)].__name__ == mapping[type(config).__mro__[2]].__name__, name
