"""The weights of one attention module by head, however its family stores them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..functional.partition import Group
from ..layouts import is_transposed, weight_rows
from ..sites import Site
from .projections import query_rows
from .replay import Rewrite


@dataclass(frozen=True)
class HeadWeights:
    """Projections by head, with the bias as the last input column (zeros if there is none), float64 unless refined.

    Attributes:
        query: (num_heads, head_dim, in_features + 1).
        key: (key-value heads, head_dim, in_features + 1).
        value: (key-value heads, v_head_dim, in_features + 1).
        output: (out_features, num_heads, v_head_dim).
        output_bias: (out_features,), or None.
        groups: original heads that form each shared head; one each before sharing.
    """

    trained: ClassVar[tuple[str, ...]] = ("query", "key", "value", "output")

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None
    groups: tuple[Group, ...]

    @property
    def group_of(self) -> Tensor:
        """Return the index of the shared head of each original key-value head, (num_kv_heads,)."""
        found = {member: i for i, group in enumerate(self.groups) for member in group}
        return torch.tensor([found[h] for h in range(len(found))], device="cpu")

    def query_heads(self, group: Group) -> Tensor:
        """Return the query heads of a group's members, member by member."""
        repeats = len(self.query) // sum(map(len, self.groups))
        return torch.cat([torch.arange(m * repeats, (m + 1) * repeats) for m in group])

    def rewrites(self) -> dict[str, Rewrite]:
        """Return the rewrites that make the original module compute with these weights, shared heads repeated."""
        of = self.group_of
        return {"query": _Project(self.query), "key": _Project(self.key[of]), "value": _Project(self.value[of])}

    def project(self, heads: Tensor) -> Tensor:
        """Return the attention output, (tokens, out_features), of what the heads give, (tokens, num_heads, dim)."""
        return projected(self.output, self.output_bias, heads)

    def folded(self) -> HeadWeights:
        """Return equal weights with the value bias moved behind the output projection, which must have a bias."""
        assert self.output_bias is not None
        repeats = len(self.query) // len(self.value)
        bias = self.value[..., -1].repeat_interleave(repeats, dim=0)  # num_heads, dim
        value = self.value.clone()
        value[..., -1] = 0
        return replace(self, value=value, output_bias=self.output_bias + torch.einsum("xha,ha->x", self.output, bias))

    def adjacent(self) -> HeadWeights:
        """Return equal weights with the query heads reordered so that groups are adjacent."""
        order = torch.cat([self.query_heads(group) for group in self.groups])
        size = len(self.groups[0])
        groups = tuple(tuple(range(i * size, (i + 1) * size)) for i in range(len(self.groups)))
        return replace(self, query=self.query[order], output=self.output[:, order], groups=groups)


@dataclass(frozen=True)
class _Project:
    """Rewrite that recomputes states from the inputs by (heads, dim, in_features + 1) weights."""

    weight: Tensor

    def __call__(self, inputs: Tensor, states: Tensor) -> Tensor:
        weight = self.weight.flatten(0, 1).to(inputs)
        projected = nn.functional.linear(inputs, weight[:, :-1], weight[:, -1])
        return projected.view(*inputs.shape[:-1], *self.weight.shape[:2]).to(states.dtype)


def projected(output: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """Multiply (tokens, num_heads, dim) by an output projection, (out_features, num_heads, dim)."""
    flat = output.flatten(1).to(heads)
    return nn.functional.linear(heads.flatten(1), flat, None if bias is None else bias.to(heads))


def read_weights(model: nn.Module, site: Site) -> HeadWeights:
    """Copy the weights of an attention module, wherever Accelerate keeps them."""
    module, layout, rows = model.get_submodule(site.path), site.layout, site.rows()
    query = module.get_submodule(layout.query)
    taken = query_rows(site, _width(query))
    output, bias = _plain(model.get_submodule(site.output))
    return HeadWeights(
        query=_augmented(query)[taken],
        key=_augmented(module.get_submodule(layout.key))[rows.key],
        value=_augmented(module.get_submodule(layout.value))[rows.value],
        output=output.reshape(len(output), site.num_heads, site.v_head_dim),
        output_bias=bias,
        groups=tuple((h,) for h in range(site.num_kv_heads)),
    )


def _plain(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    with align_module_device(module):
        bias = getattr(module, "bias", None)
        return _wide(weight_rows(module)), None if bias is None else _wide(bias)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _augmented(module: nn.Module) -> Tensor:
    weight, bias = _plain(module)
    column = weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]
    return torch.cat([weight, column], dim=1)


def _width(module: nn.Module) -> int:
    """Return out_features, also of an offloaded module, whose weight on the meta device has its shape."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if is_transposed(module) else 0]


def has_bias(model: nn.Module, site: Site, child: str) -> bool:
    """Return whether a projection has a bias."""
    return getattr(model.get_submodule(f"{site.path}.{child}"), "bias", None) is not None
