"""Merged heads inside real models: which weights result, and what must not change."""

import pytest
import torch
from architectures import tiny_model
from tolerances import ROUNDING

import hf_attnpatch as ap
from hf_attnpatch.functional.grouping import METHODS
from hf_attnpatch.probe import default_inputs, largest_difference, trace


def _logits(model):
    return trace(model, default_inputs(model)).logits


def _equal_heads(model, num_kv_heads):
    """Make the heads of each future group equal, so that merging them changes nothing."""
    with torch.no_grad():
        for site in ap.describe(model).sites:
            module = model.get_submodule(site.path)
            rows, group = site.rows(), site.num_kv_heads // num_kv_heads
            for which, name in ((rows.key, site.layout.key), (rows.value, site.layout.value)):
                projection = module.get_submodule(name)
                weight = projection.weight.t() if type(projection).__name__ == "Conv1D" else projection.weight
                for tensor in (weight, *([] if getattr(projection, "bias", None) is None else [projection.bias])):
                    for head in range(site.num_kv_heads):
                        tensor[which[head]] = tensor[which[head - head % group]].clone()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("model_type", "encoder"),
    [
        *[(t, False) for t in ("llama", "qwen2", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "falcon", "gptj")],
        *[(t, False) for t in ("codegen", "gpt_bigcode", "persimmon", "gpt_oss")],
        *[(t, True) for t in ("bert", "roberta", "distilbert", "modernbert")],
    ],
)
def test_merging_equal_heads_changes_nothing(model_type, encoder, n, method):
    """The whole chain: layout, merge, repetition, cache hook. Only a packing that is right passes."""
    model = tiny_model(model_type, encoder=encoder)
    _equal_heads(model, n)
    before = _logits(model)
    ap.patch_grouped_query(model, num_kv_heads=n, method=method)
    assert largest_difference(before, _logits(model)) <= ROUNDING[torch.float32]


def test_the_mean_is_the_mean_and_the_first_is_the_first():
    source = tiny_model("llama")
    k = source.model.layers[1].self_attn.k_proj.weight.view(4, 16, 64)
    for method, wanted in (("first", k[::2]), ("mean", k.view(2, 2, 16, 64).mean(1))):
        model = tiny_model("llama")
        ap.patch_grouped_query(model, num_kv_heads=2, method=method)
        found = model.model.layers[1].self_attn.k_proj.weight.view(2, 16, 64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)


def test_what_is_not_merged_stays_the_very_object():
    model = tiny_model("llama")
    kept = {name: p for name, p in model.named_parameters() if ".k_proj" not in name and ".v_proj" not in name}
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    found = dict(model.named_parameters())
    assert all(found[name] is p for name, p in kept.items())


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "phi3", "stablelm", "olmo2", "qwen3"])
def test_up_and_down_again_is_exact(model_type):
    model = tiny_model(model_type, num_key_value_heads=2)
    before, state = _logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    ap.patch_grouped_query(model, num_kv_heads=4)
    assert largest_difference(before, _logits(model)) <= ROUNDING[torch.float32]
    ap.patch_grouped_query(model, num_kv_heads=2, method="first")
    assert torch.equal(before, _logits(model))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_requires_grad_are_kept(model_type, dtype):
    model = tiny_model(model_type, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("0" in name)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    ap.patch_grouped_query(model, num_kv_heads=2)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_new_parameters_are_leaves_that_share_no_memory():
    model = tiny_model("llama")
    pointers = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ap.patch_grouped_query(model, num_kv_heads=2, method="first")
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert projection.weight.is_leaf
            assert projection.weight.is_contiguous()
            assert projection.weight.untyped_storage().data_ptr() not in pointers
            assert projection.weight.untyped_storage().nbytes() == projection.weight.numel() * 4


def test_attributes_and_config_follow():
    model = tiny_model("llama")
    ap.patch_grouped_query(model, num_kv_heads=1)
    assert model.config.num_key_value_heads == 1
    assert all(layer.self_attn.num_key_value_groups == 4 for layer in model.model.layers)
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    stablelm = tiny_model("stablelm")
    ap.patch_grouped_query(stablelm, num_kv_heads=2)
    assert stablelm.model.layers[0].self_attn.num_key_value_heads == 2  # an attribute of its own


def test_norms_over_all_key_heads_are_merged_with_them():
    model = tiny_model("olmo2")
    norm = model.model.layers[0].self_attn.k_norm.weight.view(4, 16)
    wanted = norm.view(2, 2, 16).mean(1).flatten()
    ap.patch_grouped_query(model, num_kv_heads=2, method="mean")
    torch.testing.assert_close(model.model.layers[0].self_attn.k_norm.weight, wanted)
    assert model.model.layers[0].self_attn.q_norm.weight.numel() == 64


@pytest.mark.parametrize(
    ("model_type", "n", "fits"),
    [("llama", 3, "1, 2, 4"), ("llama", 5, "1, 2, 4"), ("llama", 8, "1, 2, 4"), ("gpt2", 3, "1, 2, 4")],
)
def test_counts_that_do_not_divide_list_those_that_do(model_type, n, fits):
    with pytest.raises(ap.AttnPatchError, match=f"do not become {n}; choose num_kv_heads from {fits}"):
        ap.patch_grouped_query(tiny_model(model_type), num_kv_heads=n)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None, True, [2]])
def test_counts_that_are_no_counts(n):
    with pytest.raises(ap.AttnPatchError, match="must be a whole number, at least 1"):
        ap.GroupedQuery(num_kv_heads=n)


@pytest.mark.parametrize("method", ["median", "", ["mean"], "Mean", 3])
def test_methods_that_do_not_exist(method):
    with pytest.raises(ap.AttnPatchError, match="choose from: first, mean, mean_rescaled"):
        ap.GroupedQuery(num_kv_heads=2, method=method)


def test_a_shared_projection_cannot_be_shared_further():
    model = tiny_model("gpt2")
    ap.patch_grouped_query(model, num_kv_heads=2)
    with pytest.raises(ap.UnsupportedArchitecture, match="already shares 2 key-value heads"):
        ap.patch_grouped_query(model, num_kv_heads=1)


def test_cross_attention_and_encoders_keep_their_heads():
    model = tiny_model("bart", encoder=True)
    report = ap.patch_grouped_query(model, num_kv_heads=2)
    sites = ap.describe(model).sites
    assert {s.num_kv_heads for s in sites if s.cross} == {4}
    assert {s.num_kv_heads for s in sites if not s.cross} == {2}
    assert "left alone" in str(report)


@pytest.mark.parametrize("seed", range(3))
def test_three_methods_are_three_results(seed):
    found = []
    for method in METHODS:
        model = tiny_model("llama", seed=seed)
        ap.patch_grouped_query(model, num_kv_heads=2, method=method)
        found.append(_logits(model))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("model_type", "encoder"), [("xlm", None), ("convbert", True)])
def test_heads_that_cannot_be_aligned_are_averaged_and_the_report_says_so(model_type, encoder):
    model = tiny_model(model_type, encoder=encoder)
    report = ap.patch_grouped_query(model, num_kv_heads=1)
    assert "method 'mean', as heads cannot be aligned" in str(report)
    (spec,) = [patch for patch in model.config.attnpatch["patches"]]
    assert spec["method"] == "mean"
    asked = tiny_model(model_type, encoder=encoder)
    with pytest.raises(ap.AttnPatchError, match="cannot be run"):
        ap.patch_grouped_query(asked, num_kv_heads=1, method="principal")
