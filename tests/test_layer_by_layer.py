"""Converted one layer at a time, and taken up where a run was killed: the same numbers, bit for bit."""

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file, save_file

import hf_attnpatch as ap
from hf_attnpatch import aside
from hf_attnpatch.heads import calibration, conversion, layerwise

TEXT = torch.randint(5, 99, (10, 48), generator=torch.Generator().manual_seed(0))
PADDED = [{"input_ids": TEXT, "attention_mask": (torch.arange(48) >= torch.arange(10)[:, None]).long()}]


def converted(model_type, method, text=TEXT, **fields):
    model = tiny_model(model_type, **fields)
    patch = ap.GroupedQuery(num_kv_heads=2, method=method, calibration=text, refine_steps=3)
    report = ap.apply(model, patch, self_check=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, report.damage.to_dict()["layers"]


@pytest.fixture
def asked(monkeypatch):
    """What was found out about layers; a module's statistics fill the memory."""
    monkeypatch.setattr(calibration, "MEMORY", 1)
    found, ask = [], layerwise.layers_of
    monkeypatch.setattr(conversion, "layers_of", lambda *a: found.append(ask(*a)) or found[-1])
    return found


@pytest.mark.parametrize(
    ("model_type", "method", "text", "fields"),
    [
        ("llama", "calibrated", TEXT, {"num_hidden_layers": 4}),
        ("llama", "refined", PADDED, {"num_hidden_layers": 3}),
        ("gpt2", "refined", TEXT, {"n_layer": 3}),
        ("gemma2", "refined", TEXT, {}),  # layers of two kinds of mask, in turns
        ("bloom", "calibrated", TEXT, {"n_layer": 3}),
        ("bert", "calibrated", TEXT, {}),
    ],
)
def test_layer_by_layer_gives_the_same_bits_as_passes_over_the_whole_model(
    asked, monkeypatch, model_type, method, text, fields
):
    found = converted(model_type, method, text, **fields)
    assert asked[0] is not None
    monkeypatch.undo()
    wanted = converted(model_type, method, text, **fields)
    assert not [name for name in wanted[0] if not torch.equal(found[0][name], wanted[0][name])]
    assert found[1] == wanted[1]


def test_each_layer_runs_once_for_each_pass(asked, monkeypatch):
    """Three passes in all (statistics, refitting, recording), where there were three for each layer."""
    ran = []
    model = tiny_model("llama", num_hidden_layers=6)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="calibrated", calibration=TEXT), self_check=False)
    most = max(map(ran.count, range(6)))
    one_pass = 5  # batches of this text, at most
    assert ran.count(5) <= most <= 3 * one_pass + 6, ran  # and the few tokens by which it is found that it can be done


def test_layers_that_need_more_than_hidden_states_are_run_with_the_whole_model(asked, monkeypatch):
    """Here a layer adds what the first one was given, which it keeps for them."""
    model = tiny_model("llama", num_hidden_layers=3)
    held = {}
    model.model.layers[0].register_forward_hook(lambda _, args, output: held.update(first=output))
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] + held["first"], *args[1:]))
    ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="calibrated", calibration=TEXT), self_check=False)
    assert asked == [None]


def test_the_model_is_left_as_it_was(asked):
    model = tiny_model("llama", num_hidden_layers=3)
    before = [(dict(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    report = ap.apply(model, ap.GroupedQuery(num_kv_heads=2, method="calibrated", calibration=TEXT), self_check=False)
    report.revert()
    after = [(dict(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    assert [held.keys() for held, _ in before] == [held.keys() for held, _ in after]
    assert [hooks for _, hooks in before] == [hooks for _, hooks in after]


# -- laid aside --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["principal", "refined"])
def test_a_conversion_goes_on_from_the_modules_that_are_kept(asked, monkeypatch, tmp_path, method):
    wanted = converted("llama", method, num_hidden_layers=4)
    merged, merge = [], conversion.merge

    def stopping(model, site, *rest):
        if len(merged) == 2:
            raise KeyboardInterrupt
        merged.append(site.path)
        return merge(model, site, *rest)

    monkeypatch.setattr(conversion, "merge", stopping)
    with pytest.raises(KeyboardInterrupt), aside.lying_in(tmp_path, "these weights"):
        converted("llama", method, num_hidden_layers=4)
    kept = sorted(tmp_path.rglob("*.safetensors"))
    assert len(kept) == 2
    damaged = load_file(kept[1])
    damaged["key"][0] += 1
    with open(kept[1], "r+b") as file:  # one of them is not what was written
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    again = []
    monkeypatch.setattr(conversion, "merge", lambda model, site, *rest: again.append(site) or merge(model, site, *rest))
    with aside.lying_in(tmp_path, "these weights"):
        found = converted("llama", method, num_hidden_layers=4)
    assert len(again) == 3
    assert not [name for name in wanted[0] if not torch.equal(found[0][name], wanted[0][name])]
    assert found[1] == wanted[1]
    again.clear()
    with aside.lying_in(tmp_path, "other weights"):
        converted("llama", method, num_hidden_layers=4)
    assert len(again) == 4
    save_file(damaged, kept[1])  # no digest beside it
    with aside.lying_in(tmp_path, "these weights"):
        converted("llama", method, num_hidden_layers=4)
    assert len(again) == 5


def test_what_is_laid_aside_lies_in_a_file_without_a_name_and_trains(tmp_path):
    tensor = torch.randn(300, 200).t()
    assert aside.laid(tensor) is tensor
    with aside.lying_in(tmp_path, ""):
        found = aside.laid(tensor)
        assert aside.laid(tensor[:2]).data_ptr() == tensor.data_ptr()  # what is small stays
    assert torch.equal(found, tensor)
    assert not list(tmp_path.iterdir())
    found.add_(1)
    assert torch.equal(found, tensor + 1)


def test_a_disk_that_is_full_on_the_way_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "from_file", full)
    with aside.lying_in(tmp_path, ""), pytest.raises(ap.AttnPatchError, match="makes on the way cannot be written"):
        aside.laid(torch.randn(300, 200))
    assert not list(tmp_path.iterdir())
