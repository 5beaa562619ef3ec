"""Finds the transforms of a head's keys, queries and values that leave attention unchanged, by trying them.

This needs no table of families. Each hypothesis (no rotation; RoPE in halves or interleaved, on all or some dimensions;
a norm behind the projection) is tried as a random transform on one recorded call of the module, and holds if the heads'
output stays the same. Dimensions that fail every trial are `fixed`: heads are averaged there, and only refinement can
do better.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional.gauge import Frame, fixed, random_gauge, rotary, unrotated
from ..interruption import removing
from ..probe import TOLERANCE, largest_difference
from ..sites import Site
from .replay import Call, Rewrite, Taps

_NORM = r"{}_?(layer_?)?norm"
SLACK = 5  # times the rounding of logits; a wrong hypothesis differs by tenths


@dataclass(frozen=True)
class Symmetries:
    """The symmetries of one attention module.

    Attributes:
        keys: symmetries of keys and queries.
        values: symmetries of values and the output projection's columns.
        key_scale: (num_kv_heads, head_dim), the factor of a norm behind the key projection; ones without a norm.
        query_scale: (num_heads, head_dim), the same for queries.
        permutes: whether heads can be reordered: the module keeps nothing but projections for each head.
        folds: whether a constant added to a head's values comes out of the head unchanged, so that a value bias can
            move behind the output projection (not with attention sinks, whose weights do not sum to one).
        how: a few words for the report.
        normed: whether a norm behind the projection of keys undoes what would change their size.
    """

    keys: Frame
    values: Frame
    key_scale: Tensor
    query_scale: Tensor
    permutes: bool
    folds: bool
    how: str
    normed: bool = False


def read_frames(socket: Taps, call: Call, rotated: tuple[int, ...]) -> Symmetries:
    """Test every hypothesis on one call.

    Args:
        socket: the attention module.
        call: recorded in eval mode.
        rotated: numbers of dimensions that this model's rotary modules rotate.
    """
    site, module = socket.site, socket.module
    key_scale = _scale(module, "(k|key)", site.num_kv_heads, site.head_dim)
    query_scale = _scale(module, "(q|query)", site.num_heads, site.head_dim)
    found = next(_holding(socket, call, rotated, key_scale, query_scale), None)
    keys, how, normed = found or (fixed(site.head_dim), "no transform of keys is known", False)
    if not found:  # a mean is taken of projections as they are
        key_scale, query_scale = torch.ones_like(key_scale), torch.ones_like(query_scale)
    values = unrotated(site.v_head_dim)
    if not _values_hold(socket, call, values):
        values, how = fixed(site.v_head_dim), f"{how}; no transform of values is known"
    return Symmetries(keys, values, key_scale, query_scale, _permutes(socket, call), _folds(socket, call), how, normed)


def _hypotheses(dim: int, rotated: tuple[int, ...]) -> Iterator[tuple[Frame, str]]:
    yield unrotated(dim), "nothing rotates keys"
    for size in sorted({r for r in (*rotated, dim) if r <= dim and r % 2 == 0}):
        part = "" if size == dim else f" of {size} of {dim} dimensions"
        yield rotary(dim, size, False), f"rotary halves{part}"
        yield rotary(dim, size, True), f"rotary, interleaved{part}"


def _holding(
    socket: Taps, call: Call, rotated: tuple[int, ...], key_scale: Tensor, query_scale: Tensor
) -> Iterator[tuple[Frame, str, bool]]:
    """Yield the hypotheses that hold, and whether for unit factors only.

    Any factors are tried first, then, for a norm would undo those, unit factors.
    """
    site = socket.site
    for spread in (0.5, 0.0):
        for frame, how in _hypotheses(site.head_dim, rotated):
            if _keys_hold(socket, call, frame, spread, key_scale, query_scale):
                yield frame, how if spread else f"{how}, normed", not spread


def _keys_hold(socket: Taps, call: Call, frame: Frame, spread: float, key_scale: Tensor, query_scale: Tensor) -> bool:
    site, generator = socket.site, torch.Generator().manual_seed(0)
    pairs = [random_gauge(frame, generator, spread) for _ in range(site.num_kv_heads)]
    repeats = site.num_heads // site.num_kv_heads
    keys = torch.stack([p[0] for p in pairs])
    queries = torch.stack([p[1] for p in pairs]).repeat_interleave(repeats, dim=0)
    if spread:
        before, after = socket.run(call).heads, socket.run(call, key=mapping(keys), query=mapping(queries)).heads
        return agree(before, after)
    scaled = {
        "key": mapping(keys, even(key_scale, frame)),
        "query": mapping(queries, even(query_scale, frame)),
    }
    with _even_norms(socket.module, frame, site):
        before, after = socket.run(call).heads, socket.run(call, **scaled).heads
    return agree(before, after)


def _values_hold(socket: Taps, call: Call, frame: Frame) -> bool:
    site, generator = socket.site, torch.Generator().manual_seed(1)
    maps = torch.stack([random_gauge(frame, generator)[0] for _ in range(site.num_kv_heads)])
    before, after = socket.run(call).heads, socket.run(call, value=mapping(maps)).heads
    wide = maps.repeat_interleave(site.num_heads // site.num_kv_heads, dim=0)
    return agree(mapping(wide)(before, before), after)


def _permutes(socket: Taps, call: Call) -> bool:
    """Return whether moving every head by one place moves the heads' output in the same way."""
    kv, repeats = socket.site.num_kv_heads, socket.site.num_heads // socket.site.num_kv_heads
    order = torch.arange(kv).roll(1)
    heads = (order[:, None] * repeats + torch.arange(repeats)).flatten()
    moved = socket.run(call, query=_Reordered(heads), key=_Reordered(order), value=_Reordered(order))
    return agree(socket.run(call).heads[:, heads], moved.heads)


def _folds(socket: Taps, call: Call) -> bool:
    site, before = socket.site, socket.run(call)
    shift = torch.randn(site.num_kv_heads, site.v_head_dim, generator=torch.Generator().manual_seed(2))
    shift = (shift * before.value.float().std().cpu()).to(before.value)
    after = socket.run(call, value=lambda _, states: states + shift).heads
    return agree(before.heads + shift.repeat_interleave(site.num_heads // site.num_kv_heads, dim=0), after)


@dataclass(frozen=True)
class _Reordered:
    """Rewrite that reorders heads."""

    order: Tensor

    def __call__(self, _: Tensor, states: Tensor) -> Tensor:
        return states[..., self.order.to(states.device), :]


def agree(before: Tensor, after: Tensor) -> bool:
    """Return whether the heads' output is the same up to rounding."""
    allowed = max(TOLERANCE.get(before.dtype, 1e-2), TOLERANCE[torch.float32])  # norms compute in fp32 at most
    return largest_difference(before, after) <= SLACK * allowed


def mapping(maps: Tensor, scale: Tensor | None = None) -> Rewrite:
    """Return the rewrite that multiplies each head's states by a matrix, in float64.

    Args:
        maps: (heads, dim, dim).
        scale: (heads, dim); the matrix acts on the states times this, and the result is divided by it.
    """
    if scale is not None:
        maps = maps * scale[:, None, :] / scale[:, :, None]

    def rewrite(_: Tensor, states: Tensor) -> Tensor:
        return torch.einsum("hab,...hb->...ha", maps.to(states.device), states.double()).to(states.dtype)

    return rewrite


def even(scale: Tensor, frame: Frame) -> Tensor:
    """Replace the factors of a plane's two dimensions by their mean, and a block's by the block's mean."""
    out = scale.clone()
    out[:, frame.planes] = scale[:, frame.planes].mean(dim=-1, keepdim=True).expand(-1, -1, 2)
    if len(frame.block):
        out[:, frame.block] = scale[:, frame.block].mean(dim=-1, keepdim=True)
    return out


def _norms(module: nn.Module, which: str) -> list[nn.Module]:
    return [child for name, child in module.named_children() if re.fullmatch(_NORM.format(which), name)]


def _scale(module: nn.Module, which: str, heads: int, dim: int) -> Tensor:
    """Return the factors of a norm, read off its output for signs; ones if there is no norm."""
    for norm in _norms(module, which):
        weight = next(norm.parameters(recurse=False), None)
        if weight is not None and weight.numel() in (dim, heads * dim):
            signs = torch.ones_like(weight).flatten()
            signs[1::2] = -1  # mean 0 and size 1: any norm maps it to its weight
            signs = signs.view_as(weight)
            with torch.no_grad():
                found: Tensor = signs * (norm(signs) - norm(-signs)) / 2
            return found.double().cpu().view(-1, dim).expand(heads, dim)
    return torch.ones(heads, dim, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def _even_norms(module: nn.Module, frame: Frame, site: Site) -> Iterator[None]:
    """Make norms act as if their weights were constant in each plane, so that unit phases are exact."""
    with removing() as handles:
        for which, heads in (("(k|key)", site.num_kv_heads), ("(q|query)", site.num_heads)):
            scale = _scale(module, which, heads, site.head_dim)
            hook = _Times(even(scale, frame) / scale)
            handles += [norm.register_forward_hook(hook) for norm in _norms(module, which)]
        yield


@dataclass(frozen=True)
class _Times:
    """Forward hook of a norm over one head (..., dim) or over all, (..., heads * dim)."""

    ratio: Tensor

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        ratio = self.ratio[0] if output.shape[-1] == self.ratio.shape[1] else self.ratio.flatten()
        scaled: Tensor = output * ratio.to(output)
        return scaled
