"""Models whose heads agree up to what attention does not see: replicated, put through allowed transforms, shuffled.

Which transforms a family allows is a table here, written from upstream's code, and not what the package finds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_attnpatch as ap
from hf_attnpatch.functional.gauge import Frame, random_gauge, rotary, unrotated
from hf_attnpatch.layouts import weight_rows
from hf_attnpatch.sites import Site

HALVES, PAIRS, FREE = rotary(16, 16, False), rotary(16, 16, True), unrotated(16)
FRAMES = {
    **dict.fromkeys(["llama", "qwen2", "phi3", "falcon", "gpt_oss", "qwen3", "gemma3_text", "olmo2"], HALVES),
    **dict.fromkeys(["cohere", "llama4_text"], PAIRS),
    **dict.fromkeys(["gptj", "codegen", "glm4"], rotary(16, 8, True)),
    **dict.fromkeys(["gpt_neox", "stablelm"], rotary(16, 4, False)),
    "phi": rotary(16, 8, False),
    **dict.fromkeys(["gpt2", "opt", "bloom", "mpt", "bert", "gpt_neo", "gpt_bigcode"], FREE),
}
NORMED = {"qwen3", "gemma3_text", "olmo2"}  # a norm with weights behind the projections
PHASES = {*NORMED, "llama4_text"}  # any norm: keys may be turned, not stretched


def sites(model: PreTrainedModel) -> list[Site]:
    """Self-attention."""
    return [s for s in ap.describe(model).sites if not s.cross]


@dataclass
class Heads:
    """Projections of one module by head, float64: (heads, dim, in) and (heads, dim); output (out, heads, dim)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None


def read(model: PreTrainedModel, site: Site) -> Heads:
    """Copy what a module's heads are made of."""
    found = {}
    for name, index in zip(("query", "key", "value"), site.rows(), strict=True):
        child = model.get_submodule(f"{site.path}.{getattr(site.layout, name)}")
        found[name] = weight_rows(child).detach().double()[index]
        bias = getattr(child, "bias", None)
        found[f"{name}_bias"] = None if bias is None else bias.detach().double()[index]
    output = model.get_submodule(site.output)
    weight = weight_rows(output).detach().double()
    bias = getattr(output, "bias", None)
    return Heads(
        **found,
        output=weight.unflatten(1, (site.num_heads, site.v_head_dim)).clone(),
        output_bias=None if bias is None else bias.detach().double().clone(),
    )


def write(model: PreTrainedModel, site: Site, heads: Heads) -> None:
    """Write it into the parameters that are there."""
    with torch.no_grad():
        for name, index in zip(("query", "key", "value"), site.rows(), strict=True):
            child = model.get_submodule(f"{site.path}.{getattr(site.layout, name)}")
            weight_rows(child)[index] = getattr(heads, name).to(child.weight)
            bias = getattr(heads, f"{name}_bias")
            if bias is not None:
                child.bias[index] = bias.to(child.bias)
        output = model.get_submodule(site.output)
        weight_rows(output).copy_(heads.output.flatten(1))
        if heads.output_bias is not None:
            output.bias.copy_(heads.output_bias)


def replicate(model: PreTrainedModel, groups: int, value_groups: int | None = None) -> None:
    """Give all members of each future group the first one's keys and values; queries and outputs stay their own.

    Args:
        model: written to.
        groups: how many kinds of keys there will be.
        value_groups: how many kinds of values; as many by default.
    """
    for site in sites(model):
        heads = read(model, site)
        for name, count in (("value", value_groups or groups), ("key", groups)):
            size = site.num_kv_heads // count
            leader = torch.arange(site.num_kv_heads) // size * size
            for part in (name, f"{name}_bias"):
                tensor = getattr(heads, part)
                setattr(heads, part, None if tensor is None else tensor[leader])
        write(model, site, heads)
        norm = getattr(model.get_submodule(site.path), "k_norm", None)
        if (
            norm is not None and norm.weight.numel() == site.num_kv_heads * site.head_dim
        ):  # OLMo: other ones for each head
            with torch.no_grad():
                norm.weight.copy_(norm.weight.view(site.num_kv_heads, -1)[leader].flatten())


def even_norms(model: PreTrainedModel) -> None:
    """Give both dimensions of a plane one weight; only then are phases exact."""
    for site in sites(model):
        for name in ("q_norm", "k_norm"):
            weight = getattr(model.get_submodule(site.path), name).weight
            with torch.no_grad():
                by_plane = weight.view(-1, 2, 8)
                by_plane.copy_(by_plane.mean(1, keepdim=True).expand_as(by_plane))


def transform(model: PreTrainedModel, seed: int = 0, spread: float = 0.5) -> None:
    """Put every head through a random allowed transform of its own: keys and queries, values and output.

    Args:
        model: written to.
        seed: of the transforms.
        spread: 0 for rotations alone; see :func:`random_gauge`.
    """
    keys = _frame(model)
    stretch = 0.0 if model.config.model_type in PHASES else spread
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model):
        heads, repeats = read(model, site), site.num_heads // site.num_kv_heads
        for h in range(site.num_kv_heads):
            readers = slice(h * repeats, (h + 1) * repeats)
            key, query = random_gauge(keys, generator, stretch)
            value, undo = random_gauge(unrotated(site.v_head_dim), generator, spread)
            heads.key[h], heads.value[h] = key @ heads.key[h], value @ heads.value[h]
            heads.query[readers] = query @ heads.query[readers]
            heads.output[:, readers] = heads.output[:, readers] @ undo.t()  # undo^T is the inverse of value
            for bias, matrix in ((heads.key_bias, key), (heads.value_bias, value)):
                if bias is not None:
                    bias[h] = matrix @ bias[h]
            if heads.query_bias is not None:
                heads.query_bias[readers] = heads.query_bias[readers] @ query.t()
        write(model, site, heads)


def _frame(model: PreTrainedModel) -> Frame:
    frame = FRAMES[model.config.model_type]
    assert {s.head_dim for s in sites(model)} == {frame.dim}
    return frame


def shuffle(model: PreTrainedModel, seed: int = 0) -> None:
    """Put key-value heads, their query heads and their part of the output into another order, other in each module."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model):
        heads, kv = read(model, site), site.num_kv_heads
        order = torch.randperm(kv, generator=generator)
        repeats = site.num_heads // kv
        wide = (order[:, None] * repeats + torch.arange(repeats)).flatten()
        moved = {}
        for name, tensor in vars(heads).items():
            if tensor is None or name == "output_bias":
                moved[name] = tensor
            elif name == "output":
                moved[name] = tensor[:, wide]
            else:
                moved[name] = tensor[wide if name.startswith("query") else order]
        write(model, site, dataclasses.replace(heads, **moved))


def shift_key_biases(model: PreTrainedModel, seed: int = 0) -> None:
    """Add another constant to each head's keys; no softmax sees it where nothing rotates them."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model):
        heads = read(model, site)
        assert heads.key_bias is not None
        heads.key_bias += torch.randn(heads.key_bias.shape, generator=generator, dtype=torch.float64)
        write(model, site, heads)


def shift_value_biases(model: PreTrainedModel, seed: int = 0) -> None:
    """Add another constant to each head's values and take what it gives out of the output's bias."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model):
        heads, repeats = read(model, site), site.num_heads // site.num_kv_heads
        assert heads.value_bias is not None
        assert heads.output_bias is not None
        more = torch.randn(heads.value_bias.shape, generator=generator, dtype=torch.float64)
        heads.value_bias += more
        heads.output_bias -= torch.einsum("xha,ha->x", heads.output, more.repeat_interleave(repeats, dim=0))
        write(model, site, heads)
