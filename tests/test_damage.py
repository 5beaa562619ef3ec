"""The damage report: numbers against the modules themselves, its table, its JSON and its figure."""

import json

import pytest
import torch
from architectures import tiny_model

import hf_attnpatch as ap

PLAIN = ("first", "mean", "mean_rescaled")
STAGES = {
    **dict.fromkeys([*PLAIN, "procrustes", "principal"], ("merged",)),
    "calibrated": ("merged", "refitted"),
    "refined": ("merged", "refitted", "refined"),
}


def tokens(rows=6, length=48):
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(0))


def convert(method, model_type="llama", text=None, **more):
    model = tiny_model(model_type)
    report = ap.patch_grouped_query(
        model, num_kv_heads=2, method=method, calibration=tokens() if text is None else text, refine_steps=20, **more
    )
    return report, report.damage


@pytest.mark.parametrize("method", STAGES)
def test_every_stage_is_measured(method):
    report, damage = convert(method)
    assert damage.stages == STAGES[method]
    for layer in damage.layers:
        assert tuple(layer.gaps) == STAGES[method]
        for gap in layer.gaps.values():
            assert 0 < gap.output < 10
            assert 0 < gap.attention < 10
    text = " ".join(str(report).split())
    assert "model.layers.1.self_attn" in text
    assert all(stage in str(damage) for stage in STAGES[method])


def test_each_repair_helps():
    """On text that it has not seen; a refinement that does not is thrown away."""
    _, damage = convert("refined", text=tokens(40, 64))
    for layer in damage.layers:
        gaps = [layer.gaps[s] for s in STAGES["refined"]]
        assert gaps[1].output < gaps[0].output
        assert gaps[2].output + 4 * gaps[2].attention <= gaps[1].output + 4 * gaps[1].attention


@pytest.mark.parametrize(
    ("method", "n"),
    [("mean", 2), ("procrustes", 2), ("principal", 1), ("calibrated", 2), ("refined", 2), ("refined", 1)],
)
def test_the_numbers_are_those_of_the_modules(method, n):
    """The first layer sees the same inputs before and after: its own outputs and eager attention weights.

    So what was written is what was measured last.
    """
    model, ids, seen = tiny_model("llama", attn_implementation="eager"), tokens(1, 128), []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda _, args, output: seen.append([t.double() for t in output]))
    with torch.no_grad():
        model(input_ids=ids)
        start = len(seen)
        report = ap.patch_grouped_query(model, num_kv_heads=n, method=method, calibration=ids, refine_steps=20)
        middle = len(seen)
        model(input_ids=ids)
    assert middle > start
    (before, p), (after, q) = seen[0], seen[-1]
    error = float((after - before).square().mean() / before.var())
    divergence = torch.where(p > 0, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), p).sum(-1).mean()
    gap = report.damage.layers[0].gaps[STAGES[method][-1]]
    assert gap.output == pytest.approx(error, rel=1e-3)
    assert gap.attention == pytest.approx(float(divergence), rel=1e-3)


def test_the_energy_of_equal_heads_is_whole_and_of_random_ones_is_not():
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            weight = getattr(model.model.layers[0].self_attn, name).weight.view(2, 2, 16, 64)
            weight[:, 1] = weight[:, 0]
    damage = ap.patch_grouped_query(model, num_kv_heads=2, method="principal").damage
    assert damage.layers[0].key_energy == pytest.approx(1, abs=1e-6)
    assert damage.layers[0].value_energy == pytest.approx(1, abs=1e-6)
    assert damage.layers[1].key_energy < 0.95
    assert damage.layers[1].value_energy < 0.95


@pytest.mark.parametrize("method", ["first", "mean", "principal", "refined"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_data_is_json(model_type, method):
    _, damage = convert(method, model_type)
    found = json.loads(json.dumps(damage.to_dict(), allow_nan=False))
    assert found["method"] == method
    assert [layer["path"] for layer in found["layers"]] == [layer.path for layer in damage.layers]
    for layer, wanted in zip(found["layers"], damage.layers, strict=True):
        assert layer["groups"] == [list(group) for group in wanted.groups]
        assert sorted(head for group in layer["groups"] for head in group) == [0, 1, 2, 3]
        assert set(layer["gaps"]) == set(STAGES[method])
        assert layer["gaps"]["merged"]["output"] == wanted.gaps["merged"].output
    assert all(seconds >= 0 for seconds in found["seconds"].values())


def test_without_text_there_is_energy_and_nothing_else():
    model = tiny_model("llama")
    report = ap.patch_grouped_query(model, num_kv_heads=2, method="principal")
    assert report.damage.stages == ()
    json.dumps(report.damage.to_dict(), allow_nan=False)
    assert all(0 < layer.key_energy < 1 for layer in report.damage.layers)


@pytest.mark.parametrize("method", PLAIN)
def test_methods_that_look_at_nothing_report_nothing(method):
    assert ap.patch_grouped_query(tiny_model("llama"), num_kv_heads=2, method=method).damage is None
    assert ap.patch_flash(tiny_model("llama"), backend="sdpa").damage is None


@pytest.mark.parametrize(
    ("method", "text"),
    [("mean", True), ("principal", True), ("principal", False), ("calibrated", True), ("refined", True)],
)
def test_the_figure_is_a_picture(method, text, tmp_path):
    model = tiny_model("gpt2" if method == "mean" else "llama")
    more = {"calibration": tokens()} if text else {}
    damage = ap.patch_grouped_query(model, num_kv_heads=2, method=method, refine_steps=4, **more).damage
    path = tmp_path / "damage.png"
    damage.save_figure(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert width > 2 * height > 800


def test_similar_groups_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("k_proj", "v_proj"):
                weight = getattr(layer.self_attn, name).weight.view(4, 16, 64)
                weight[2], weight[3] = weight[0].clone(), weight[1].clone()
    report = ap.patch_grouped_query(model, num_kv_heads=2, method="principal", grouping="similar")
    assert [layer.groups for layer in report.damage.layers] == [((0, 2), (1, 3))] * 2
    assert "0+2 1+3" in str(report)


def test_where_attention_weights_cannot_be_had_they_are_none_and_no_number():
    """Falcon does not return them: its output is measured, and refined, all the same."""
    _, damage = convert("refined", "falcon", text=tokens(40, 64))
    for layer in damage.layers:
        assert all(gap.attention is None for gap in layer.gaps.values())
        assert layer.gaps["refined"].output <= layer.gaps["refitted"].output < layer.gaps["merged"].output
    assert (
        json.loads(json.dumps(damage.to_dict(), allow_nan=False))["layers"][0]["gaps"]["refined"]["attention"] is None
    )


def test_a_pruned_layer_puts_out_nothing_and_loses_nothing():
    """Its error is 0 of no variance: a number all the same, and no reason to stop."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    options = {"method": "refined", "calibration": tokens(), "refine_steps": 4}
    damage = ap.patch_grouped_query(model, num_kv_heads=2, **options).damage
    found = json.loads(json.dumps(damage.to_dict(), allow_nan=False))["layers"]
    assert [gap["output"] for gap in found[0]["gaps"].values()] == [0, 0, 0]
    assert found[1]["gaps"]["refined"]["output"] > 0
    assert all(weight.isfinite().all() for weight in model.parameters())
