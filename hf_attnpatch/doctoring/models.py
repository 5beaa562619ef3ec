"""The models on which patches are tried: the embedded one, and a tiny random one for each kind of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .. import embedded

_ROTARY = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64},
}
# model type -> its config, beside 128 tokens and no special ones
TINY: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_ROTARY, "num_key_value_heads": 2},
    "mistral": {**_ROTARY, "sliding_window": 8},
    "gemma2": {**_ROTARY, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        **{"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 1, "max_seq_len": 64},
}
EMBEDDED = "embedded"
MODELS = (EMBEDDED, *TINY)
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def build(name: str, device: torch.device, attention: str | None = None) -> PreTrainedModel:
    """Return a model to try patches on, in eval mode and fp32.

    Args:
        name: ``embedded`` or a key of :data:`TINY`.
        device: where it is wanted.
        attention: its attention implementation; by default what transformers chooses.
    """
    chosen = {} if attention is None else {"attn_implementation": attention}
    if name == EMBEDDED:
        model: PreTrainedModel = embedded.load_model()
        model.set_attn_implementation(attention or model.config._attn_implementation)
        return model.to(device)
    config = AutoConfig.for_model(name, vocab_size=128, **_NO_TOKENS, **TINY[name])
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen)
    _fill(model)
    return model.to(device).eval()


def _fill(model: PreTrainedModel) -> None:
    """Move every parameter off its initial value, so that attention is not uniform, and biases and norms matter."""
    generator = torch.Generator().manual_seed(0)
    inputs = {id(m.weight): m.weight.shape[0] for m in model.modules() if isinstance(m, Conv1D)}  # stands transposed
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * inputs.get(id(parameter), parameter.shape[-1]) ** -0.5)
