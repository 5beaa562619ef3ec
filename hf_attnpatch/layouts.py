"""How families name and pack query, key, value and output projections: one row per naming scheme.

A layout tells which child modules are the projections and, for fused ones, which output rows belong to which head. A
new architecture is a row at the end of this file; no other code of the package knows a family's names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .modules.heads import GroupedProjection


class Rows(NamedTuple):
    """Output rows of each projection, as index tensors (num_heads, head_dim), (num_kv, head_dim), (num_kv, v_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor


Packing = Callable[[int, int, int, int], Rows]  # (num_heads, num_kv_heads, head_dim, v_head_dim) -> Rows


def _run(start: int, heads: int, dim: int) -> Tensor:
    return torch.arange(start, start + heads * dim, device="cpu").view(heads, dim)


def separate(heads: int, kv: int, dim: int, v_dim: int) -> Rows:
    """Query, key and value each fill a module of their own."""
    return Rows(_run(0, heads, dim), _run(0, kv, dim), _run(0, kv, v_dim))


def blocks(heads: int, kv: int, dim: int, v_dim: int) -> Rows:
    """All queries, then all keys, then all values (GPT-2, Phi-3, MPT)."""
    k = heads * dim
    return Rows(_run(0, heads, dim), _run(k, kv, dim), _run(k + kv * dim, kv, v_dim))


def per_group(heads: int, kv: int, dim: int, v_dim: int) -> Rows:
    """For each key-value head: its queries, its key, its value (GPT-NeoX, BLOOM; Falcon with groups)."""
    each = heads // kv
    width = each * dim + dim + v_dim
    rows = torch.arange(kv * width, device="cpu").view(kv, width)
    query, key, value = rows[:, : each * dim], rows[:, each * dim : -v_dim], rows[:, -v_dim:]
    return Rows(query.reshape(heads, dim), key, value)


def codegen(heads: int, kv: int, dim: int, v_dim: int) -> Rows:
    """Four model-parallel slices, each queries, then *values*, then keys (CodeGen's mp_num)."""
    rows = (
        torch.arange(3 * heads * dim, device="cpu").view(4, 3, heads // 4, dim).transpose(0, 1).reshape(3, heads, dim)
    )
    return Rows(rows[0], rows[2], rows[1])


@dataclass(frozen=True)
class Layout:
    """A naming scheme.

    Attributes:
        name: its name in reports.
        query: path of the query projection below the attention module; equal to ``key`` if fused.
        key: path of the key projection.
        value: path of the value projection.
        output: candidate paths of the output projection, of which the first existing one counts; ``..`` is the parent.
        packing: which rows belong to which head.
        classes: class names that it is limited to, if the same name is packed differently elsewhere; such rows come
            first.
    """

    name: str
    query: str
    key: str
    value: str
    output: tuple[str, ...]
    packing: Packing = separate
    classes: tuple[str, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether one module holds all three."""
        return self.query == self.key

    def matches(self, module: nn.Module) -> bool:
        """Return whether this module has the children that the scheme names."""
        if self.classes and type(module).__name__ not in self.classes:
            return False
        return all(is_projection(module, path) for path in (self.query, self.key, self.value))


def is_projection(module: nn.Module, path: str) -> bool:
    """Return whether a dotted path below ``module`` is a plain projection (no adapter, not quantized)."""
    child: object = module
    for name in path.split("."):
        child = getattr(child, name, None)
    return isinstance(child, (nn.Linear, Conv1D, GroupedProjection))


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is stored as (in, out), as in transformers' Conv1D."""
    return isinstance(module, Conv1D)


def weight_rows(module: nn.Module) -> Tensor:
    """Return the weight as a view of shape (out_features, in_features)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(module) else weight


_OUT = (
    "o_proj",
    "out_proj",
    "dense",
    "c_proj",
    "wo",
    "Wo",
    "o",
    "out_lin",
    "attn_out",
    "output",
    "..output.dense",
    "output_projection.o_proj",
)


def _fused(name: str, child: str, output: tuple[str, ...], packing: Packing, classes: tuple[str, ...] = ()) -> Layout:
    return Layout(name, child, child, child, output, packing, classes)


LAYOUTS = (
    _fused("c_attn per group", "c_attn", ("c_proj",), per_group, ("GPTBigCodeAttention",)),
    _fused("qkv_proj model-parallel", "qkv_proj", ("out_proj",), codegen, ("CodeGenAttention",)),
    Layout("q/k/v", "q_proj", "k_proj", "v_proj", _OUT),
    Layout("query/key/value", "query", "key", "value", ("..output.dense", *_OUT)),
    Layout("query/key/value_proj", "query_proj", "key_proj", "value_proj", ("..output.dense", *_OUT)),
    Layout("q_lin/k_lin/v_lin", "q_lin", "k_lin", "v_lin", _OUT),
    Layout("project_q/k/v", "project_q", "project_k", "project_v", ("attention_out",)),
    Layout("Wq/Wk/Wv", "Wq", "Wk", "Wv", ("dense",)),
    Layout("q/k/v_proj.linear", "q_proj.linear", "k_proj.linear", "v_proj.linear", ("o_proj.linear",)),
    Layout("q/k/v bare", "q", "k", "v", _OUT),
    _fused("c_attn blocks", "c_attn", ("c_proj",), blocks),
    _fused("qkv_proj blocks", "qkv_proj", _OUT, blocks),
    _fused("Wqkv blocks", "Wqkv", ("out_proj", "Wo"), blocks),
    _fused("query_key_value per group", "query_key_value", ("dense",), per_group),
)
