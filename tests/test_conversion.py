"""Conversions of every method on every way in which a family keeps its heads: applied, copied, saved, taken back."""

import copy
import json

import pytest
import torch
import transformers
from architectures import tiny_model
from snapshot import snapshot
from tolerances import ROUNDING

import hf_attnpatch as ap
from hf_attnpatch.evaluation import cache_bytes_per_token
from hf_attnpatch.probe import default_inputs, largest_difference, trace

PLAIN = ("first", "mean", "mean_rescaled")
METHODS = ("procrustes", "principal", "calibrated", "refined")
FAMILIES = [
    *("llama", "qwen2", "gpt2", "gpt_neox", "phi3", "falcon", "bloom", "mpt", "opt", "gptj", "bert", "qwen3"),
    *("gemma3_text", "gpt_oss", "cohere2", "llama4_text", "glm4", "qwen3_next", "bart"),
]
ENCODERS = {"bert", "bart"}
STOCK = {"llama", "qwen2", "phi3", "qwen3", "gemma3_text", "gpt_oss", "cohere2", "llama4_text", "glm4", "qwen3_next"}
GROUPED = ["llama", "qwen2", "phi3", "qwen3", "gemma3_text", "glm4"]
QUICK = {(t, "calibrated") for t in FAMILIES} | {(t, m) for t in ("llama", "gpt2") for m in METHODS}


def tokens(rows=6, length=48, seed=0):
    return torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def build(model_type, **overrides):
    return tiny_model(model_type, encoder=model_type in ENCODERS, **overrides)


def logits(model):
    return trace(model, default_inputs(model)).logits


def patch(method, n=2, **more):
    text = {"calibration": tokens(), "refine_steps": 5} if method in ("calibrated", "refined") else {}
    return ap.GroupedQuery(num_kv_heads=n, method=method, **{**text, **more})


def cells(families=FAMILIES, quick=QUICK):
    for model_type in families:
        for method in METHODS:
            marks = () if (model_type, method) in quick else pytest.mark.full
            yield pytest.param(model_type, method, marks=marks, id=f"{model_type}-{method}")


def assert_applied_and_reverted(model, method, n, folder):
    """All that must hold of any conversion; returns nothing and leaves the model as it was."""
    model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    before, original, state = snapshot(model), logits(model), torch.get_rng_state()
    kept = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    own = [s for s in ap.describe(model).sites if not s.cross]
    report = ap.apply(model, patch(method, n))

    assert {s.num_kv_heads for s in ap.describe(model).sites if not s.cross} == {n}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    parts = {f"{s.path}.{name}" for s in own for name in (s.layout.query, s.layout.key, s.layout.value)}
    parts |= {s.output for s in own}
    old = dict((name, number) for name, number, *_ in before["parameters"])
    for name, parameter in model.named_parameters():
        assert (parameter.dtype, parameter.requires_grad) == kept[name]
        assert parameter.is_leaf
        if name.rpartition(".")[0] in parts:
            assert id(parameter) != old[name], f"{name} has its old weights"
        elif name.rpartition(".")[0].rpartition(".")[0] not in {s.path for s in own}:  # norms of heads are made anew
            assert id(parameter) == old[name], f"{name} is no part of attention"

    found = logits(model)
    assert found.isfinite().all()
    assert largest_difference(original, found) > 1e-3
    assert report.damage.method == method
    assert [layer.path for layer in report.damage.layers] == [s.path for s in own]
    assert json.loads(json.dumps(model.config.attnpatch))["patches"][-1]["num_kv_heads"] == n

    assert torch.equal(logits(copy.deepcopy(model)), found)
    copy.deepcopy(model).save_pretrained(folder)  # transformers notes what it saved in the config
    again = ap.load(folder) if not report.stock else getattr(transformers, type(model).__name__).from_pretrained(folder)
    assert torch.equal(logits(again.eval()), found)

    report.revert()
    after = snapshot(model)
    for part in before:
        assert after[part] == before[part], part
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize(("model_type", "method"), list(cells()))
def test_converted_copied_saved_and_reverted(model_type, method, tmp_path):
    model = build(model_type)
    assert ap.plan(model, patch(method)).stock == (model_type in STOCK)
    assert_applied_and_reverted(model, method, 2, tmp_path)


@pytest.mark.parametrize(("model_type", "method"), list(cells(GROUPED, {("llama", "calibrated"), ("phi3", "refined")})))
def test_so_are_heads_that_are_grouped_already(model_type, method, tmp_path):
    model = build(model_type, num_key_value_heads=2)
    assert_applied_and_reverted(model, method, 1, tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
def test_similar_heads_are_converted_copied_saved_and_reverted(model_type, tmp_path):
    model = build(model_type)
    original, before = logits(model), snapshot(model)
    report = ap.apply(model, patch("principal", grouping="similar"))
    found = logits(model)
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert torch.equal(logits(ap.load(tmp_path).eval()), found)
    report.revert()
    assert snapshot(model) == before
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_cache_shrinks_by_the_group(model_type, method):
    model = build(model_type)
    before = cache_bytes_per_token(model)
    ap.apply(model, patch(method, 1))
    assert cache_bytes_per_token(model) == before / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_weights_of_any_precision(model_type, method, dtype):
    model = build(model_type, dtype=dtype)
    report = ap.apply(model, patch(method))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()
    for layer in report.damage.layers:
        assert 0 < layer.key_energy <= 1
        assert 0 < layer.value_energy <= 1
        for gap in layer.gaps.values():
            assert 0 <= gap.output < 10
            assert -1e-3 <= gap.attention < 10


@pytest.mark.parametrize("method", ["principal", "calibrated"])
def test_bf16_and_fp32_weights_come_to_the_same(method):
    """What is measured and solved is fp32 and fp64, so that bf16 weights cost no more than their own rounding."""
    wide, narrow = build("llama"), build("llama").to(torch.bfloat16)
    wide.load_state_dict({k: v.float() for k, v in narrow.state_dict().items()})
    before = largest_difference(logits(wide), logits(narrow))
    reports = [ap.apply(model, patch(method)) for model in (wide, narrow)]
    assert largest_difference(logits(wide), logits(narrow)) < 5 * before < 0.2
    for one, two in zip(*(r.damage.layers for r in reports), strict=True):
        assert (one.groups, one.frame) == (two.groups, two.frame)
        assert one.key_energy == pytest.approx(two.key_energy, rel=0.01)
        assert one.value_energy == pytest.approx(two.value_energy, rel=0.01)


@pytest.mark.parametrize("method", ["calibrated", "refined"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_seed_gives_the_same_bits_whatever_the_global_one(model_type, method):
    found = []
    for seed in (1, 2):
        model = build(model_type)
        torch.manual_seed(seed)
        ap.apply(model, patch(method, seed=3, calibration=tokens(64, 64).split(4)))  # batches have an order, too
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_a_seed_is_of_the_order_of_the_text():
    found = []
    for seed in (1, 2):
        model = build("llama")
        ap.apply(model, patch("refined", seed=seed, calibration=tokens(64, 64)))
        found.append(model.model.layers[0].self_attn.k_proj.weight.detach())
    assert not torch.equal(*found)
    assert largest_difference(*found) < 0.5


def test_the_default_is_refined_with_text_and_principal_without():
    report = ap.patch_grouped_query(build("llama"), num_kv_heads=2)
    assert report.damage.method == "principal"
    assert report.record["patches"][0]["method"] == "principal"
    report = ap.patch_grouped_query(build("llama"), num_kv_heads=2, calibration=tokens(), refine_steps=2)
    assert report.damage.method == "refined"
    assert report.record["patches"][0]["method"] == "refined"
    assert "calibration" not in report.record["patches"][0]


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "bert"])
def test_text_changes_nothing_for_methods_that_need_none(model_type, method):
    """It only pays for a damage report."""
    without, with_ = build(model_type), build(model_type)
    ap.apply(without, patch(method))
    report = ap.apply(with_, patch(method, calibration=tokens()))
    assert report.damage.stages == ("merged",)
    for (name, one), two in zip(without.named_parameters(), with_.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_similar_groups_are_for_plain_methods_too(model_type, method):
    """Copies of heads far apart: adjacent groups lose, similar ones do not."""
    model = build(model_type)
    with torch.no_grad():
        for site in ap.describe(model).sites:
            rows = site.rows()
            for name, index in ((site.layout.key, rows.key), (site.layout.value, rows.value)):
                child = model.get_submodule(f"{site.path}.{name}")
                weight = child.weight.t() if model_type == "gpt2" else child.weight
                for tensor in (weight, *([child.bias] if getattr(child, "bias", None) is not None else [])):
                    tensor[index[2]], tensor[index[3]] = tensor[index[0]].clone(), tensor[index[1]].clone()
    before = logits(model)
    with ap.patched(model, patch(method)):
        assert largest_difference(before, logits(model)) > 0.1
    ap.apply(model, patch(method, grouping="similar"))
    assert largest_difference(before, logits(model)) <= ROUNDING[torch.float32]


def test_refinement_stops_in_time():
    report = ap.apply(build("llama"), patch("refined", refine_steps=100_000, refine_seconds=0.2))
    assert report.damage.seconds["refinement"] < 20


def test_attention_that_passes_no_gradient_cannot_be_refined_and_says_so():
    """MRA's, on CPU; the closed form needs no gradient."""
    model = tiny_model("mra", encoder=True)
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=r"layer\.0\.attention\.self.*gradient.*method='calibrated'"):
        ap.apply(model, patch("refined"))
    assert snapshot(model) == before
    assert ap.apply(model, patch("calibrated")).changed


def test_a_plan_runs_nothing():
    model = build("llama")
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plan = ap.plan(model, patch("refined"))
    assert not calls
    assert "o_proj" in str(plan)
    handle.remove()


def test_with_another_patch_before_and_after():
    """The statistics are those of the model as it was; the two edits do not meet."""
    rope = ap.RopeScaling(kind="linear", factor=4.0)
    one, two = build("llama"), build("llama")
    ap.apply(one, patch("calibrated"), rope)
    ap.apply(two, rope, patch("calibrated"))
    assert torch.equal(logits(one), logits(two))
    assert {r["patch"] for r in one.config.attnpatch["patches"]} == {"grouped_query", "rope_scaling"}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_hook_on_a_new_projection_leaves_the_old_one_alone(model_type):
    model = build(model_type)
    site = ap.describe(model).sites[0]
    report = ap.apply(model, patch("principal"))
    new = [model.get_submodule(path) for path in (f"{site.path}.{site.layout.query}", site.output)]
    for module in new:
        module.register_forward_hook(lambda *_: None)
    report.revert()
    for path in (f"{site.path}.{site.layout.query}", site.output):
        assert model.get_submodule(path) not in new
        assert not model.get_submodule(path)._forward_hooks
