"""Where a report says that there are no positions, a probe has shown it."""

import pytest
import torch
from architectures import tiny_model
from media_models import media_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap

PATCHES = (
    ap.NoPosition(),
    ap.PositionTable(length=64),
    ap.Sinusoidal(),
    ap.Alibi(backend="sdpa"),
    ap.RelativeXl(backend="sdpa"),
)


class _Still(nn.Module):
    """What a Llama asks for angles: none, for its attention rotates by hand."""

    def forward(self, states, position_ids):
        self.width = self.width if hasattr(self, "width") else 16
        ones = states.new_ones(len(position_ids), position_ids.shape[-1], self.width)
        return ones, torch.zeros_like(ones)


def _by_hand(told):
    """A Llama whose projections of queries and keys are rotated inside of its attention, as remote code does."""
    model = tiny_model("llama")
    model.model.rotary_emb = _Still()
    seen = {}

    def note(_, args, kwargs):
        positions = kwargs.get("position_ids")
        ids = kwargs.get("input_ids", args[0] if args else None)
        counted = torch.arange(ids.shape[1])[None]
        seen["positions"] = positions if told and positions is not None else counted

    def rotate(module, args, output):
        heads = output.view(*output.shape[:2], -1, 16)
        angles = seen["positions"][..., None].float() / torch.tensor([10.0 ** (i / 2) for i in range(8)])
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        a, b = heads.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(2)

    model.register_forward_pre_hook(note, with_kwargs=True)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(rotate)
        layer.self_attn.k_proj.register_forward_hook(rotate)
    return model


@pytest.mark.parametrize("told", [True, False], ids=["by the positions given", "by counting"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.name)
def test_a_rotation_by_hand_is_found_and_refused(patch, told):
    model = _by_hand(told)
    with pytest.raises(ap.AttnPatchError, match="tells positions apart by something that was not recognised"):
        ap.apply(model, patch)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_the_bias_of_t5_is_named(model_type):
    model = media_model(model_type)
    assert "learned bias by distance" in ap.describe(model).positions
    with pytest.raises(ap.AttnPatchError, match="relative_attention_bias"):
        ap.patch_no_position(model)


@pytest.mark.parametrize(("model_type", "encoder"), [("mpnet", True), ("xlnet", False)])
def test_encoders_with_a_bias_and_relative_terms_are_refused(model_type, encoder):
    with pytest.raises(ap.AttnPatchError, match="tells positions apart"):
        ap.patch_no_position(tiny_model(model_type, encoder=encoder))


@pytest.mark.parametrize("model_type", ["bart", "marian", "pegasus"])
def test_encoder_decoders_with_tables_lose_them(model_type):
    model = media_model(model_type)
    ap.patch_no_position(model)
    ids, decoder = torch.tensor([[5, 9, 13, 8]]), torch.tensor([[7, 30]])
    with torch.no_grad():
        found = [model(input_ids=x, decoder_input_ids=decoder).logits for x in (ids, ids.flip(1))]
    assert torch.allclose(*found, atol=1e-5)


def test_a_model_without_positions_says_so_only_where_it_was_tried():
    nope = LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()
    nope.model.rotary_emb = _Still()
    report = ap.patch_no_position(nope)
    assert not report.changed
    assert "no positions were there to take out: equal tokens, and tokens farther apart" in str(report)
    assert "whether there are none was not tried" in " ".join(str(ap.patch_no_position(tiny_model("mamba"))).split())


_SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": 128, "max_position_embeddings": 64},
}


def test_a_config_edited_afterwards_is_not_taken_for_the_rotation():
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    before = model.model.rotary_emb.inv_freq.clone()
    assert ap.patch_rotary(model, theta=500.0).changed
    assert not torch.equal(before, model.model.rotary_emb.inv_freq)
    assert not ap.patch_rotary(model, theta=500.0).changed


def test_another_backend_in_one_part_is_not_already_in_use():
    model = media_model("llava", attention="sdpa")
    model.set_attn_implementation({"vision_config": "eager"})
    assert model.config._attn_implementation == "sdpa"
    assert ap.patch_flash(model, backend="sdpa").changed
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_a_kernel_inside_of_forwards_is_no_other_backend():
    model = tiny_model("bloom")
    ap.patch_flash(model)
    with pytest.raises(ap.AttnPatchError, match="take no other backend"):
        ap.patch_flash(model, backend="flex_attention")
