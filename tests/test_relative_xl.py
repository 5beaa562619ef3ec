"""RelativeXl on models: every kernel, caches, grouped heads, checkpoints, what it begins with, and what it refuses."""

import copy
import sys

import pytest
import torch
from architectures import tiny_inputs, tiny_model
from caches import CACHE
from peft import LoraConfig, get_peft_model
from snapshot import snapshot
from test_alibi import _Library, _plain
from tolerances import ROUNDING
from transformers import AutoModelForCausalLM, StaticCache

import hf_attnpatch as ap
from hf_attnpatch.attention import flash
from hf_attnpatch.attention.registry import attention_function, set_kernel
from hf_attnpatch.attention.relative import relative_of
from hf_attnpatch.probe import default_inputs, largest_difference, trace

FP32 = ROUNDING[torch.float32]


def _stirred(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "relative_xl" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def _patched(model_type, encoder=False, dtype=torch.float32, **fields):
    model = tiny_model(model_type, encoder=encoder, dtype=dtype)
    ap.patch_relative_xl(model, **fields)
    return _stirred(model)


@torch.no_grad()
def _logits(model, **inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "encoder"),
    [*((t, False) for t in ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "opt")), ("bert", True)],
)
def test_every_kernel_agrees_with_the_dense_reference(model_type, encoder, dtype):
    model = _patched(model_type, encoder, dtype, backend="eager")
    inputs = default_inputs(model)
    wanted = trace(model, inputs).logits
    for name in ("sdpa", "flex_attention") if model._supports_flex_attn else ("sdpa",):
        set_kernel(name).run(model)
        assert largest_difference(wanted, trace(model, inputs).logits) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv", [4, 2])
def test_flash_attention_gets_wider_heads(version, padded, kv, monkeypatch):
    """Against a function that stands in for the library; nothing of it ran on a GPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", _Library())
    monkeypatch.setattr(flash, "_flash_attention_forward", _plain)
    model = tiny_model("llama", num_key_value_heads=kv)
    ap.patch_relative_xl(model, backend="eager")
    module = _stirred(model).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 20, 16, generator=generator) for n in (4, kv, kv))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    mask = mask if padded else None
    found, _ = attention_function(f"flash_attention_{version}")(module, query, key, value, mask, scaling=0.25)
    seen = None if mask is None else mask[:, None, None].bool()
    wanted, _ = attention_function("sdpa")(module, query, key, value, seen, scaling=0.25)
    assert found.shape == wanted.shape
    rows = slice(4, None) if padded else slice(None)
    torch.testing.assert_close(found[:, rows], wanted[:, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_a_cache_of_fixed_length_changes_nothing(model_type):
    model = _patched(model_type)
    ids = tiny_inputs(model, length=20)["input_ids"]
    wanted = _logits(model, input_ids=ids)
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [model(input_ids=ids[:, :12], **{CACHE: cache}, use_cache=True).logits]
    for at in range(12, 20):
        where = {"cache_position": torch.tensor([at])} if model_type == "llama" else {}
        parts.append(model(input_ids=ids[:, at : at + 1], **{CACHE: cache}, use_cache=True, **where).logits)
    assert largest_difference(wanted, torch.cat(parts, 1)) < FP32


def test_it_reads_beyond_any_table():
    model = _patched("gpt2")
    assert _logits(model, input_ids=torch.randint(5, 99, (1, 300))).isfinite().all()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_grouped_heads_before_and_after(model_type, order, tmp_path):
    patches = [ap.RelativeXl(), ap.GroupedQuery(num_kv_heads=2, method="mean")]
    model = tiny_model(model_type)
    for patch in patches[:: 1 - 2 * order]:
        ap.apply(model, patch)
    assert len(ap.describe(_stirred(model)).relative) == 2
    assert {site.num_kv_heads for site in ap.describe(model).sites} == {2}
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(_logits(model, **inputs), _logits(again.eval(), **inputs))


def test_recency_makes_near_keys_count_whatever_the_module_scales_by():
    """OPT scales its queries before attention, Llama in it: where all content is equal, attention must be the same."""
    shares = {}
    for model_type in ("llama", "opt"):
        model = tiny_model(model_type)
        ap.patch_relative_xl(model, backend="eager")
        site = ap.describe(model).sites[0]
        module = model.get_submodule(site.path)
        for part in (site.layout.query, site.layout.key):
            for parameter in module.get_submodule(part).parameters():
                parameter.data.zero_()
        weights = []
        hook = module.register_forward_hook(lambda _, args, out, kept=weights: kept.append(out[1]))
        model(**tiny_inputs(model, length=24), output_attentions=True)
        hook.remove()
        shares[model_type] = weights[0][0, :, -1]
        bias = -torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])[:, None] * torch.arange(23, -1, -1)
        assert float((shares[model_type] - bias.softmax(-1)).abs().sum(-1).max()) < 0.1
    assert largest_difference(shares["llama"], shares["opt"]) < 1e-3


def test_zero_begins_as_a_model_without_positions_and_all_of_it_learns():
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    ap.patch_relative_xl(model, init="zero")
    ap.patch_no_position(twin)
    inputs = tiny_inputs(model)
    assert largest_difference(_logits(model, **inputs), _logits(twin, **inputs)) < FP32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    terms = relative_of(model.model.layers[0].self_attn)
    assert all(bool(parameter.any()) for parameter in terms.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 7}, "size is 7; it must be an even number"),
        ({"size": 0}, "at least 2"),
        ({"size": True}, "size is True"),
        ({"init": "random"}, "init 'random' does not exist; choose from: recency, zero"),
        ({"backend": "cudnn"}, "backend 'cudnn' does not exist; choose from auto, eager, sdpa"),
        ({"theta": 0.5}, "theta is 0.5"),
        ({"backend": "flash_attention_2"}, "no fused kernel adds Transformer-XL's terms here.*needs a CUDA device"),
    ],
)
def test_arguments_out_of_range(fields, words):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ap.AttnPatchError, match=words):
        ap.patch_relative_xl(model, **fields)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("deepseek_v3", "the terms need heads of queries and keys"),
        ("mamba", "linear attention keeps a state.*the terms need heads"),
        ("ctrl", "tells positions apart by something that was not recognised|the terms need heads"),
    ],
)
def test_models_without_heads_to_stand_beside_are_refused(model_type, words):
    model = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=words):
        ap.patch_relative_xl(model)
    assert snapshot(model) == before


def test_a_kernel_that_is_chosen_later_keeps_the_terms():
    model = _patched("llama")
    wanted = _logits(model, **tiny_inputs(model))
    model.set_attn_implementation("eager")
    assert largest_difference(wanted, _logits(model, **tiny_inputs(model))) < 2 * ROUNDING[torch.float32]


def test_stock_transformers_says_what_to_install(tmp_path):
    model = _patched("llama")
    model.save_pretrained(tmp_path)
    assert "pip install hf_attnpatch" in (tmp_path / "config.json").read_text()
    assert _logits(ap.load(tmp_path).eval(), **tiny_inputs(model)).equal(_logits(model, **tiny_inputs(model)))


def test_peft_trains_a_copy_of_the_terms():
    """A copy that attention would not see is a model without positions."""
    model = _patched("llama")
    inputs = tiny_inputs(model)
    wanted = _logits(model, **inputs)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["relative_xl"]))
    assert torch.equal(_logits(tuned, **inputs), wanted)
    tuned(**inputs).logits.square().mean().backward()
    trained = {name: p for name, p in tuned.named_parameters() if "relative_xl" in name and p.requires_grad}
    assert len(trained) == 6
    for parameter in trained.values():
        assert bool(parameter.grad.any())
        parameter.data.add_(0.5)
    assert largest_difference(_logits(tuned, **inputs), wanted) > 1e-3
    with tuned.disable_adapter():
        assert torch.equal(_logits(tuned, **inputs), wanted)


def test_something_unknown_in_the_place_of_the_terms_is_an_error():
    model = _patched("llama")
    model.model.layers[0].self_attn.relative_xl = torch.nn.Identity()
    with pytest.raises(ap.AttnPatchError, match="relative_xl is a Identity, which attention cannot read"):
        _logits(model, **tiny_inputs(model))


@pytest.mark.parametrize("patch", [ap.RelativeXl(), ap.Alibi()])
def test_heads_are_shared_on_text_under_new_positions(patch):
    """Damage is measured with attention weights, by the dense attention that has these positions."""
    model = tiny_model("llama")
    ap.apply(model, patch)
    report = ap.patch_grouped_query(model, num_kv_heads=2, calibration=torch.randint(5, 99, (6, 64)), refine_steps=2)
    assert all(layer.gaps["refined"].attention is not None for layer in report.damage.layers)


@pytest.mark.parametrize("patch", [ap.RelativeXl(), ap.Alibi(), ap.Rotary()])
def test_a_model_without_data_cannot_be_tried(patch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("gpt2").config)
    with pytest.raises(ap.UnsupportedArchitecture, match="has no data .on the meta device.; load the weights"):
        ap.plan(model, patch)
