"""Tiny models with weights far from their initial values: distributions that are far from uniform."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def spread(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.dim() == 1)
    return model.eval()


def llama(seed=1, **config):
    return spread(LlamaForCausalLM(LlamaConfig(**{**SMALL, **HEADS, **config})), seed)


def gemma2():
    """A soft cap after its head that bends its logits, and a sliding window in every other layer."""
    model = spread(Gemma2ForCausalLM(Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=3.0, sliding_window=16)))
    model.lm_head.weight.data *= 3
    return model


def gpt2():
    return spread(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=2)))


MODELS = {"llama": llama, "gemma2": gemma2, "gpt2": gpt2}
