"""Tiny models with a memory of segments, and their references."""

import contextlib
import copy

import torch
from architectures import tiny_model

import hf_attnpatch as ap
from hf_attnpatch.functional.segments import Segments

L, M = 8, 12
NATIVE = {"bloom", "mpt", "gptj", "codegen", "falcon", "gpt_neox_japanese"}  # compute their scores by themselves
SIZE = {"gpt2": "n_positions", "mpt": "max_seq_len", "gptj": "n_positions", "codegen": "n_positions"}


def built(model_type, alibi=False, **overrides):
    size = {} if model_type == "bloom" else {SIZE.get(model_type, "max_position_embeddings"): 512}
    model = tiny_model(model_type, **{**size, **overrides})
    if alibi == "xl":
        ap.patch_relative_xl(model, size=8)
        for parameter in (p for n, p in model.named_parameters() if "relative_xl" in n):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    elif alibi:
        ap.patch_alibi(model)
    return model


def random_ids(rows, tokens, seed=0):
    return torch.randint(5, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


DEPTH = {"llama": "num_hidden_layers", "falcon": "num_hidden_layers", "mpt": "n_layers"}


def given_places(model, tokens, positions):
    if not ap.describe(model).tables:
        return {}
    places = torch.arange(tokens) % L if positions == "bounded" else torch.arange(tokens)
    return {"position_ids": places[None]}


def under_the_mask(model, ids, positions="bounded", sinks=0):
    """Logits of an unpatched model under the mask of blocks, each with a window before it."""
    mask = Segments(L, M, sinks).mask(ids.shape[1])[None, None].expand(len(ids), 1, -1, -1)
    if model.config.model_type in NATIVE:
        with torch.no_grad(), masked(model, mask):
            return model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, use_cache=False, **given_places(model, ids.shape[1], positions)
        ).logits


@contextlib.contextmanager
def masked(model, mask):
    """Attention modules that compute their scores by themselves get this mask; True is seen."""
    hidden = ~mask if model.config.model_type == "mpt" else torch.zeros((), dtype=model.dtype).masked_fill(~mask, -1e30)

    def give(module, args, kwargs):
        return args, {**kwargs, "attention_mask": hidden}

    hooks = [
        model.get_submodule(s.path).register_forward_pre_hook(give, with_kwargs=True) for s in ap.describe(model).sites
    ]
    yield
    for hook in hooks:
        hook.remove()


def with_memory(model, positions="bounded", length=L, memory=M, sinks=0):
    patched = copy.deepcopy(model)
    sizes = {"segment_length": length, "memory_length": memory, "num_sinks": sinks}
    ap.patch_segment_recurrence(patched, **sizes, positions=positions)
    return patched


@torch.no_grad()
def logits_of(model, ids, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits
