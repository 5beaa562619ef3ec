import pytest
import torch
from architectures import (
    FAST,
    FAST_ENCODERS,
    UNBUILDABLE,
    VOCAB,
    causal_lm_types,
    encoder_types,
    tiny_config,
    tiny_inputs,
    tiny_model,
)


def _cases():
    fast = {*((t, False) for t in FAST), *((t, True) for t in FAST_ENCODERS)}
    for case in [*((t, False) for t in causal_lm_types()), *((t, True) for t in encoder_types())]:
        yield pytest.param(
            *case, marks=() if case in fast else pytest.mark.full, id="-".join([case[0], *["masked"] * case[1]])
        )


def _logits(model):
    with torch.no_grad():
        output = model(**tiny_inputs(model))
    return output["logits"] if "logits" in output else output[0]


@pytest.mark.parametrize(("model_type", "encoder"), list(_cases()))
def test_builds_tiny_and_not_trivial(model_type, encoder):
    model = tiny_model(model_type, encoder=encoder)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.training
    logits = _logits(model)
    assert torch.isfinite(logits).all()
    assert 0.2 < logits.std(-1).mean() < 8
    twin = tiny_model(model_type, encoder=encoder).state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        assert parameter.numel() < 3 or parameter.std() > 0, f"{name} is constant"
        assert torch.isfinite(parameter).all(), f"{name} is not finite"


def test_nearly_all_types_build():
    built = causal_lm_types()
    assert set(FAST) <= set(built)
    assert len(built) > 100  # transformers 5.23: 186 of 189
    assert all(len(reason) > 10 for reason in UNBUILDABLE.values())


def test_seeds_differ_and_dtypes_agree():
    first, other, half = tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("llama", dtype=torch.bfloat16)
    assert not torch.equal(_logits(first), _logits(other))
    weights = zip(first.parameters(), half.parameters(), strict=True)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in weights)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_overrides_reach_the_fields():
    assert tiny_config("llama", num_key_value_heads=2).num_key_value_heads == 2
    assert tiny_config("gemma3", num_key_value_heads=2).text_config.num_key_value_heads == 2
    assert tiny_config("dbrx", attn_config={"kv_n_heads": 2}).attn_config.kv_n_heads == 2
    assert tiny_config("gpt2", num_hidden_layers=3).n_layer == 3  # a name of the attribute map
    assert tiny_config("llama").vocab_size == VOCAB
    assert tiny_model("bert").config.is_decoder
    assert not tiny_model("bert", encoder=True).config.is_decoder
