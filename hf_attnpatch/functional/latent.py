"""Latent attention from grouped heads: which keys stay rotated, and what one shared latent keeps of the rest.

RoPE turns plane p of every key-value head by the same phase, so that the components of plane p over the G heads form a
complex vector of length G, and any linear map of that vector commutes with RoPE. Components that are kept form the
shared rotary key; the rest of the keys, unrotated, and the values form the latent. Everything here is float64.

Which component stays rotated: the one whose energy, weighted by the queries, times what a score loses when its rotation
becomes a constant is largest. With the attention a over distances D, the constant that serves best is
rho = E_a[e^(-i D w)], and 1 - |rho|^2 of the energy is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gauge import complex_planes, plane_map
from .merging import roots

TINY = 1e-12
NOTHING = 1e-12  # of the keys' energy


def mean_rotation(mass: Tensor, frequencies: Tensor) -> Tensor:
    """Return rho, the mean of e^(-i D w) over the attention of each head, (heads, planes), complex.

    Args:
        mass: attention by distance, (heads, distances), in tokens from 0; any scale.
        frequencies: w of each plane, in radians per token.
    """
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-300)
    angles = torch.arange(mass.shape[1], dtype=torch.float64)[:, None] * frequencies.double()
    return torch.complex(share @ angles.cos(), -(share @ angles.sin()))


def assumed_mass(heads: int, length: int) -> Tensor:
    """Return attention by distance where none was measured: as 1 / (1 + distance), (heads, length)."""
    return (1 / torch.arange(1, length + 1, dtype=torch.float64)).expand(heads, length)


def by_distance(probabilities: Tensor) -> Tensor:
    """Sum attention weights over equal distances.

    Args:
        probabilities: (heads, length, length), rows of queries; what a query does not see is 0.

    Returns:
        (heads, length), by distance from 0.
    """
    length = probabilities.shape[-1]
    at = torch.arange(length, device=probabilities.device)
    distance = (at[:, None] - at).clamp(min=0).flatten()
    out = probabilities.new_zeros(len(probabilities), length)
    return out.index_add_(1, distance, probabilities.flatten(1))


@dataclass(frozen=True)
class Seen:
    """What is known of one attention module.

    Attributes:
        states: covariance of keys (before RoPE) and values side by side, (G * (dim + v_dim),) twice, keys first.
        mean: of the same.
        query: mean square of each query head in each plane, (num_heads, planes).
        rho: (num_heads, planes), complex; see :func:`mean_rotation`.
        output: W^T W of the output projection of each key-value head's queries, summed, (G, v_dim, v_dim).
    """

    states: Tensor
    mean: Tensor
    query: Tensor
    rho: Tensor
    output: Tensor


@dataclass(frozen=True)
class Components:
    """The complex components of each plane over the key-value heads, those with most energy first.

    Attributes:
        weight: root of the queries' energy, (G, planes).
        held: of that, what an unrotated key still serves, (G, planes).
        vectors: (planes, G, G), components in columns, of weighted keys.
        gain: (planes, G): energy that is lost if the component is not rotated.
    """

    weight: Tensor
    held: Tensor
    vectors: Tensor
    gain: Tensor


def components(seen: Seen, planes: Tensor, heads: int) -> Components:
    """Find the components of each plane.

    Args:
        seen: of the module.
        planes: (planes, 2), the pairs of dimensions that RoPE rotates.
        heads: key-value heads.
    """
    dim = 2 * len(planes)
    keys = seen.states[: heads * dim, : heads * dim].view(heads, dim, heads, dim)
    energy = seen.query.view(heads, -1, len(planes))  # G, members, planes
    kept = seen.rho.abs().square().view_as(energy)
    total = energy.sum(1) + TINY * energy.mean().clamp_min(1e-300)
    weight, held = total.sqrt(), ((energy * kept).sum(1) / total).sqrt()
    moments = complex_planes(keys, planes) * weight.t()[:, :, None] * weight.t()[:, None, :]
    values, vectors = torch.linalg.eigh(moments)
    lost = 1 - torch.einsum("pgj,gp->pj", vectors.abs().square(), held.square())
    gain = values.clamp_min(0) * lost.clamp_min(0)
    order = gain.argsort(dim=1, descending=True)
    return Components(weight, held, vectors.gather(2, order[:, None].expand_as(vectors)), gain.gather(1, order))


def choose_planes(gains: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """Return how many components of each plane stay rotated, the same in all layers: one rotary table serves them.

    Args:
        gains: of each layer, (planes, G), falling in each plane.
        count: of components in all.
    """
    total = torch.stack(list(gains)).sum(0)
    chosen = total.flatten().argsort(descending=True)[:count]
    return tuple(torch.bincount(chosen // total.shape[1], minlength=len(total)).tolist())


@dataclass(frozen=True)
class Split:
    """Latent attention as linear maps of the heads' keys and values, in the coordinates of the original heads.

    Attributes:
        key: (2 * components, G * dim): the shared rotary key, real parts before imaginary ones.
        key_reader: (num_heads, 2 * components, dim): applied to queries before RoPE.
        latent: (rank, G * (dim + v_dim)): of keys and values side by side, less their mean.
        query: (num_heads, dim, dim): applied to queries that meet unrotated keys.
        up_key: (num_heads, dim, rank): unrotated keys of the latent.
        up_value: (num_heads, v_dim, rank): values of the latent.
        value: (num_heads, v_dim): a constant added to them.
        energy: shares of the energy that are kept, of keys and of values.
    """

    key: Tensor
    key_reader: Tensor
    latent: Tensor
    query: Tensor
    up_key: Tensor
    up_value: Tensor
    value: Tensor
    energy: tuple[float, float]


def split(
    seen: Seen, found: Components, planes: Tensor, counts: Sequence[int], rank: int, share: float, gain: float = 1.0
) -> Split:
    """Split keys into a rotary part and the rest, and compress the rest together with the values.

    Args:
        seen: of the module.
        found: its components.
        planes: (planes, 2).
        counts: components of each plane that stay rotated.
        rank: of the latent, without a constant.
        share: weight of unrotated keys beside values, whose weight is 1, when the latent is chosen.
        gain: what cosine and sine are multiplied by, of the queries and of the keys each.
    """
    heads, dim = len(found.weight), 2 * len(planes)
    members, wide = len(seen.query) // heads, heads * dim
    size = len(seen.output[0])
    owner = torch.arange(heads).repeat_interleave(members)
    key, reader, back = _rotary(found, planes, counts)
    scale = _real(found.weight * found.held.clamp_min(1e-6), planes).flatten()  # of a key's two dimensions each
    rest = torch.eye(wide, dtype=torch.float64) - back @ key
    root, inverse = roots(seen.output)
    values = _blocks(*root) @ seen.states[wide:, wide:] @ _blocks(*root)
    left = scale[:, None] * rest
    keys = left @ seen.states[:wide, :wide] @ left.t()
    whole = _real(found.weight, planes).flatten().square() @ seen.states[:wide, :wide].diagonal()
    some = float(keys.trace()) > NOTHING * float(whole)  # else all that is left is rounding
    strength = share * float(keys.trace()) ** -0.5 if some else 0.0
    size_v = max(float(values.trace()), 1e-300) ** -0.5
    tall = _blocks(strength * left, size_v * _blocks(*root))
    moments = tall @ seen.states @ tall.t()
    energies, vectors = torch.linalg.eigh(moments)
    top = vectors[:, -rank:]
    spread = energies[-rank:].clamp_min(TINY * energies[-1].clamp_min(1e-300)) ** 0.25  # shared by both sides
    latent = (top / spread).t() @ tall
    up_k = (top[:wide] * spread) / (strength * scale[:, None]) if some else torch.zeros_like(top[:wide])
    up_v = _blocks(*inverse) @ (top[wide:] * spread) / size_v
    lost = _lost(moments, top, wide)
    return Split(
        key=key,
        key_reader=reader[owner],
        latent=latent,
        query=plane_map(seen.rho.conj() * gain**2, planes, dim),
        up_key=up_k.view(heads, dim, rank)[owner],
        up_value=up_v.view(heads, size, rank)[owner],
        value=seen.mean[wide:].view(heads, size)[owner],
        energy=(1 - lost[0] * float(keys.trace() / whole.clamp_min(1e-300)), 1 - lost[1]),
    )


def _blocks(*parts: Tensor) -> Tensor:
    """Return the block-diagonal matrix of some matrices."""
    return torch.block_diag(*parts)  # type: ignore[no-any-return, no-untyped-call]


def _lost(moments: Tensor, top: Tensor, keys: int) -> tuple[float, float]:
    """Return what projecting on ``top`` loses of the first ``keys`` dimensions and of the others, as shares."""
    kept = top @ (top.t() @ moments @ top) @ top.t()
    whole, found = moments.diagonal(), kept.diagonal()
    parts = [(float(whole[s].sum()), float(found[s].sum())) for s in (slice(0, keys), slice(keys, None))]
    return tuple(1 - found / whole if whole > 0 else 0.0 for whole, found in parts)  # type: ignore[return-value]


def _rotary(found: Components, planes: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps of keys to the shared rotary key, of each head's queries, and of the rotary key back to keys."""
    heads, dim = len(found.weight), 2 * len(planes)
    total = sum(counts)
    down = torch.zeros(total, heads, len(planes), dtype=torch.complex128)
    up = torch.zeros_like(down)
    at = 0
    for plane, count in enumerate(counts):
        for j in range(count):
            vector, weight = found.vectors[plane, :, j], found.weight[:, plane]
            down[at, :, plane] = vector.conj() * weight
            up[at, :, plane] = vector / weight
            at += 1
    key = torch.zeros(2 * total, heads, dim, dtype=torch.float64)
    back = torch.zeros_like(key)
    x, y = planes[:, 0], planes[:, 1]
    for out, factor in ((key, down), (back, up.conj())):  # real and imaginary part of factor * (k_x + i k_y)
        out[:total, :, x], out[:total, :, y] = factor.real, -factor.imag
        out[total:, :, x], out[total:, :, y] = factor.imag, factor.real
    return key.flatten(1), back.transpose(0, 1).contiguous(), back.flatten(1).t()


def _real(per_plane: Tensor, planes: Tensor) -> Tensor:
    """(heads, planes) -> (heads, dim): the number of its plane for each dimension."""
    out = per_plane.new_empty(len(per_plane), 2 * len(planes))
    out[:, planes[:, 0]] = out[:, planes[:, 1]] = per_plane
    return out


def stock_factors(wanted: Tensor, theta: float) -> list[float]:
    """Return divisors d_i with which theta^(-2i / n) / d_i is a table of frequencies, n / 2 of them.

    A layer that computes 1 / (d_i * theta^(2i / n)) in float32 rounds three times; of the divisors nearby, the one is
    taken whose result is nearest to what is wanted, mostly the very number.

    Args:
        wanted: float32, in any order, repeats included.
        theta: the base.
    """
    size = 2 * len(wanted)
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    best = (1.0 / wanted.double() / powers.double()).float()
    near = [best]
    for direction in (torch.inf, -torch.inf):
        step = best
        for _ in range(3):
            step = torch.nextafter(step, torch.full_like(step, direction))
            near.append(step)
    tried = torch.stack(near)
    error = (1.0 / (tried * powers) - wanted.float()).abs()
    return [float(t) for t in tried.gather(0, error.argmin(0)[None])[0]]
