"""Models that Accelerate dispatched or offloaded: converted where they are, to what they would be in memory."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from architectures import tiny_model
from transformers import AutoModelForCausalLM

import hf_attnpatch as ap
from hf_attnpatch import evaluation
from hf_attnpatch.comparing.digest import model_digest
from hf_attnpatch.probe import default_inputs

CPU = torch.device("cpu")
MODELS = ["llama", "gpt2", "qwen2"]
METHODS = ["mean", "principal", "calibrated", "refined"]


def hooked(model, folder):
    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def in_memory(model, folder):
    return cpu_offload(model, execution_device=CPU) or model


def on_disk(model, folder):
    disk_offload(model, str(folder / "offload"), execution_device=CPU)
    return model


def partly(model, folder):
    """As `from_pretrained` does where a model is larger than memory: some layers stay, some lie on disk."""
    model.save_pretrained(folder / "whole")
    names = [path for path, m in model.named_modules() if path.endswith((".0", ".1")) and path.count(".") == 2]
    last = max(names)
    device_map = {path: "cpu" for path, m in model.named_modules() if path and not any(m.children())}
    device_map = {path: device for path, device in device_map.items() if not path.startswith(f"{last}.")}
    device_map[last] = "disk"
    for path, module in model.named_modules():
        own = [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if own and not any(path == p or path.startswith(f"{p}.") for p in device_map):
            device_map[path] = "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder / "whole", device_map=device_map, offload_folder=str(folder / "offload"), dtype=torch.float32
    )


WAYS = [hooked, in_memory, on_disk, partly]


def patch(method):
    ids = torch.randint(5, 99, (6, 48), generator=torch.Generator().manual_seed(0))
    text = {"calibration": ids, "refine_steps": 4} if method in ("calibrated", "refined") else {}
    return ap.GroupedQuery(num_kv_heads=2, method=method, **text)


@torch.no_grad()
def logits(model):
    return model(**default_inputs(model)).logits


def offloaded(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        pytest.param(t, m, marks=() if t == "llama" or m == "refined" else pytest.mark.full)
        for t in MODELS
        for m in METHODS
    ],
)
def test_converted_where_it_is(model_type, way, method, tmp_path):
    reference = tiny_model(model_type)
    original = logits(reference)
    ap.apply(reference, patch(method))
    wanted = logits(reference)

    model = way(tiny_model(model_type), tmp_path)
    assert any(hasattr(m, "_hf_hook") for m in model.modules())
    if way is not hooked:
        assert offloaded(model)
    assert torch.equal(logits(model), original)
    before = offloaded(model)
    report = ap.apply(model, patch(method))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    assert {s.num_kv_heads for s in ap.describe(model).sites} == {2}
    report.revert()
    assert torch.equal(logits(model), original)
    assert offloaded(model) == before


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("way", [hooked, partly], ids=lambda way: way.__name__)  # transformers saves no others either
def test_what_was_converted_there_is_saved_whole(way, tmp_path):
    model = way(tiny_model("llama"), tmp_path)
    ap.apply(model, patch("principal"))
    found = logits(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(logits(again), found)
    assert again.config.num_key_value_heads == 2


def test_a_device_map_of_one_device_needs_no_hooks(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, dtype=torch.float32).eval()
    reference = tiny_model("llama")
    for each in (model, reference):
        ap.apply(each, patch("calibrated"))
    assert torch.equal(logits(model), logits(reference))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("way", [in_memory, on_disk], ids=lambda way: way.__name__)
def test_a_choice_is_made_from_weights_that_are_elsewhere(way, tmp_path):
    model = way(tiny_model("llama"), tmp_path)
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads="auto", cache_target=0.5))
    assert report.record["patches"][0]["num_kv_heads"] == 2


def test_weights_that_are_nowhere_are_an_error():
    with torch.device("meta"):
        model = tiny_model_on_meta()
    with pytest.raises(ap.UnsupportedArchitecture, match="has no data .*; load the weights"):
        ap.apply(model, patch("principal"))


def tiny_model_on_meta():
    reference = tiny_model("llama")
    return type(reference)(reference.config)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_measured_where_it_is(way, tmp_path):
    plain, model = tiny_model("llama"), way(tiny_model("llama"), tmp_path)
    text = [list(range(5, 29)), list(range(60, 36, -1))]
    wanted, found = (evaluation.perplexity(each, text, lengths=(8, 16), targets=4) for each in (plain, model))
    assert [s.nats for s in found.scores] == pytest.approx([s.nats for s in wanted.scores], abs=1e-6)
    same = evaluation.fidelity(plain, model, [{"input_ids": torch.tensor(text)}], continuation=4)
    assert same.kl.nats == pytest.approx(0, abs=1e-6)
    assert same.continuation.value == 1
    assert model_digest(model) == model_digest(plain)


def test_a_digest_of_weights_that_are_not_there_is_an_error():
    with torch.device("meta"):
        model = tiny_model_on_meta()
    with pytest.raises(ap.AttnPatchError, match="has no data"):
        model_digest(model)


def test_verify_asks_an_offloaded_model_where_its_inputs_belong():
    model = cpu_offload(tiny_model("llama"), execution_device=CPU)
    found = {finding.invariant: finding for finding in ap.verify(model).findings}
    assert found["two forwards are equal"].outcome == "pass"
    assert found["cached decoding, token by token"].outcome == "pass"
