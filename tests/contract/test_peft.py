"""Adapters go on top of a patched model; a patch under adapters is refused."""

import peft
import pytest
import torch
from architectures import tiny_model
from snapshot import snapshot

import hf_attnpatch as ap
from hf_attnpatch.probe import default_inputs, trace

# model type -> query and output projections, and the key or fused projection that the patch has replaced
TARGETS = {
    "llama": (["q_proj", "o_proj"], "k_proj"),
    "opt": (["q_proj", "out_proj"], "k_proj"),
    "gpt2": (["c_proj"], "c_attn"),
    "gpt_neox": (["dense"], "query_key_value"),
}
FOREIGN = ["opt", "gpt2", "gpt_neox"]
NATIVE = ["llama", "qwen2", "qwen3", "gemma2"]  # biases of q, k and v; norms of q and k; another scale
REFINED = ap.GroupedQuery(
    num_kv_heads=2, method="refined", calibration=torch.arange(512).view(16, 32) % 60, refine_steps=1
)


def _patched(model_type):
    model = tiny_model(model_type)
    ap.patch_grouped_query(model, num_kv_heads=2)
    return model


@pytest.mark.parametrize("model_type", TARGETS)
def test_lora_on_a_patched_model_trains_saves_and_loads(model_type, tmp_path):
    model = _patched(model_type)
    inputs = default_inputs(model)
    plain = trace(model, inputs).logits
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS[model_type][0], r=2))
    assert torch.equal(trace(adapted.get_base_model(), inputs).logits, plain)  # LoRA begins at zero
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = trace(adapted.get_base_model(), inputs).logits
    assert not torch.equal(wanted, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(trace(loaded.get_base_model(), inputs).logits, wanted)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(trace(merged, inputs).logits, wanted, rtol=0, atol=1e-4)
    assert {site.num_kv_heads for site in ap.describe(merged).sites} == {2}


@pytest.mark.parametrize("model_type", NATIVE)
def test_full_rank_keys_and_values_on_refined_heads_train_save_load_and_merge(model_type, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(model_type)
    text = torch.randint(0, model.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(1))
    ap.patch_grouped_query(model, num_kv_heads=2, method="refined", calibration=text, refine_steps=3)
    inputs = default_inputs(model)
    plain = trace(model, inputs).logits
    model.save_pretrained(tmp_path / "base")
    targets = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["k_proj", "v_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    assert torch.equal(trace(adapted.get_base_model(), inputs).logits, plain)
    learns = {
        name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in name
    }
    assert learns == {"k_proj", "v_proj"}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = trace(adapted.get_base_model(), inputs).logits
    assert not torch.equal(wanted, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(trace(loaded.get_base_model(), inputs).logits, wanted)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(trace(merged, inputs).logits, wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(trace(again, inputs).logits, trace(merged, inputs).logits)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("base", "merged"))
    assert {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])} == {
        *targets["target_modules"],
        *targets["modules_to_save"],
    }
    assert {site.num_kv_heads for site in ap.describe(again).sites} == {2}


@pytest.mark.parametrize("model_type", FOREIGN)
def test_lora_on_a_shared_projection_is_refused_by_name(model_type):
    with pytest.raises(ValueError, match="GroupedProjection"):
        peft.get_peft_model(_patched(model_type), peft.LoraConfig(target_modules=[TARGETS[model_type][1]], r=2))


@pytest.mark.parametrize("model_type", TARGETS)
@pytest.mark.parametrize(
    "patch", [ap.GroupedQuery(num_kv_heads=2), REFINED, ap.Flash(backend="sdpa")], ids=lambda p: p.name
)
def test_a_patch_on_a_peft_model_is_refused(model_type, patch):
    adapted = peft.get_peft_model(tiny_model(model_type), peft.LoraConfig(target_modules=TARGETS[model_type][0], r=2))
    with pytest.raises(ap.UnsupportedArchitecture, match="before get_peft_model"):
        ap.apply(adapted, patch)


@pytest.mark.parametrize("targets", [["k_proj", "v_proj"], ["q_proj"], "all-linear"])
@pytest.mark.parametrize("saved", [None, ["k_proj", "v_proj"]])
def test_a_grouped_query_patch_on_the_base_model_of_adapters_is_refused(targets, saved):
    if saved and targets != ["q_proj"]:
        targets = ["o_proj"]
    model = tiny_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=saved, r=2))
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=r"(?i)adapter|lora"):
        ap.patch_grouped_query(model, num_kv_heads=2)
    assert snapshot(model) == before


def _adds_adapters(model):
    """Whether transformers itself adds an adapter with the PEFT that is installed; it is there then."""
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["k_proj"], r=2))
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        return False
    return True


def test_a_patch_on_a_model_with_its_own_adapters_is_refused():
    model = tiny_model("llama")
    if not _adds_adapters(model):  # 5.24 wants a PEFT that is not out yet; what PEFT adds by itself is refused above
        return
    before = snapshot(model)
    with pytest.raises(ap.UnsupportedArchitecture, match=r"(?i)adapter|lora"):
        ap.patch_grouped_query(model, num_kv_heads=2)
    assert snapshot(model) == before
