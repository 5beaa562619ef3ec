"""Merges several heads into one by the best linear maps, from weights alone or from covariances, in closed form.

A merge replaces the keys k_j of the members of a group by one, s = sum_j shared[j] k_j, and the queries of member j by
reader[j] q; or the values by one, s = sum_j shared[j] v_j, and the output projection W_j of member j by W_j reader[j].
Every method is such a set of maps. Everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gauge import Frame, block_map, complex_planes, plane_map

RIDGE = 1e-9  # of a covariance's mean eigenvalue: keeps roots invertible, moves nothing that matters


@dataclass(frozen=True)
class Sharing:
    """The maps by which the members of one group share a key (or a value).

    Attributes:
        shared: (members, dim, dim): the shared vector is the sum of shared[j] times member j's.
        reader: (members, dim, dim): applied to the member's queries; for values, the member's part of the output
            projection is multiplied by it from the right.
        energy: share of the weighted energy that is kept, in [0, 1]; nan without a covariance.
    """

    shared: Tensor
    reader: Tensor
    energy: float = float("nan")


def calibrated_keys(frame: Frame, keys: Tensor, means: Tensor, queries: Tensor) -> Sharing:
    """Return the shared key that keeps most of the scores' energy: complex PCA in each plane, PCA elsewhere.

    In a plane, score = Re conj(c) z e^(i t) with c the query's and z the key's coordinate; the group's keys, each
    weighted by the root of its queries' energy, are replaced by their first principal component over the members. On
    unrotated dimensions the weight is a matrix, and a constant added to all keys changes no softmax: centred there.

    Args:
        frame: of the head.
        keys: E[k k^T], (members, dim, members, dim), before RoPE.
        means: E[k], (members, dim).
        queries: E[q q^T] summed over the query heads of each member, (members, dim, dim).
    """
    dim = frame.dim
    parts = [_planes(frame, keys, queries), _block(frame.block, dim, keys, means, queries), kept(frame, keys, queries)]
    energy, total = sum(p[2] for p in parts), sum(p[3] for p in parts)
    shared, reader = torch.stack([p[0] for p in parts]).sum(0), torch.stack([p[1] for p in parts]).sum(0)
    return Sharing(shared, reader, energy / total if total else 1.0)


Part = tuple[Tensor, Tensor, float, float]  # shared, reader, energy kept, energy in all


def _planes(frame: Frame, keys: Tensor, queries: Tensor) -> Part:
    x, y = frame.planes[:, 0], frame.planes[:, 1]
    weight = queries[:, x, x] + queries[:, y, y]  # members, planes: energy of the queries
    weight = (weight + RIDGE * weight.mean().clamp_min(1e-300)).sqrt().t()  # planes, members
    moments = complex_planes(keys, frame.planes)  # planes, members, members
    values, vectors = torch.linalg.eigh(moments * weight[:, :, None] * weight[:, None, :])
    top = vectors[..., -1]  # planes, members
    mean = moments.diagonal(dim1=1, dim2=2).real.mean(dim=1)  # a member's energy
    size = _ratio(mean, values[:, -1]).sqrt()[:, None]  # gives the shared key that energy
    shared = plane_map((top.conj() * weight * size).t(), frame.planes, frame.dim)
    reader = plane_map((top.conj() / weight / size).t(), frame.planes, frame.dim)
    # a score is the real part of a product whose phase turns with distance: half of the energy
    return shared, reader, float(values[:, -1].sum()) / 2, float(values.sum()) / 2


def _block(
    block: Tensor, dim: int, keys: Tensor, means: Tensor, queries: Tensor
) -> tuple[Tensor, Tensor, float, float]:
    members, size = len(means), len(block)
    centred = keys - means[:, :, None, None] * means[None, None]
    moments = centred[:, block][:, :, :, block].reshape(members * size, members * size)
    weights, inverses = roots(queries[:, block[:, None], block])  # members, size, size
    big = _diagonal(weights)
    values, vectors = torch.linalg.eigh(big @ moments @ big)
    top = vectors[:, -size:].reshape(members, size, size)  # member, dimension, component
    mean = moments.diagonal().reshape(members, size).sum(1).mean()
    shared = top.transpose(1, 2) @ weights
    flat = shared.permute(1, 0, 2).reshape(size, members * size)
    scale = _ratio(mean, (flat @ moments @ flat.t()).diagonal().sum()).sqrt()
    reader = top.transpose(1, 2) @ inverses
    energy, total = float(values[-size:].sum()), float(values.sum())
    return block_map(shared * scale, block, dim), block_map(reader / scale, block, dim), energy, total


def kept(frame: Frame, states: Tensor, weights: Tensor) -> Part:
    """Return the mean on dimensions without a transform, each weighted by the diagonal of (members, dim, dim)."""
    members, dim = states.shape[:2]
    eye = block_map(torch.eye(len(frame.fixed), dtype=states.dtype), frame.fixed, dim).expand(members, dim, dim)
    moments = states[:, frame.fixed][:, :, :, frame.fixed].diagonal(dim1=1, dim2=3)  # members, members, size
    weight = weights.diagonal(dim1=1, dim2=2)[:, frame.fixed]  # members, size
    own = moments.diagonal(dim1=0, dim2=1).t()  # members, size
    lost = own - 2 * moments.mean(dim=1) + moments.mean(dim=(0, 1))
    total = float((weight * own).sum())
    return eye / members, eye, total - float((weight * lost).sum()), total


def calibrated_values(frame: Frame, values: Tensor, output: Tensor) -> Sharing:
    """Return the shared value that keeps most of the heads' output: weighted PCA of attended values.

    Minimises sum_j E |W_j (y_j - reader_j s)|^2 over all linear s = sum_j shared_j y_j. (Letting every query head weigh
    with its own covariance, by alternating least squares, was tried and moved the loss by less than 0.01.)

    Args:
        frame: of the head: `unrotated`, or `fixed` where something acts on values before the output projection.
        values: E[y y^T] of the members' values averaged by attention, (members, dim, members, dim).
        output: W^T W summed over the query heads of each member, (members, dim, dim).
    """
    members, dim = output.shape[:2]
    if len(frame.fixed):
        shared, reader, energy, total = kept(frame, values, output)
        return Sharing(shared, reader, energy / total if total else 1.0)
    moments = values.reshape(members * dim, members * dim)
    weights, inverses = roots(output)
    big = _diagonal(weights)
    energies, vectors = torch.linalg.eigh(big @ moments @ big)
    top = vectors[:, -dim:].reshape(members, dim, dim)  # member, dimension, component
    flat = top.reshape(members * dim, dim).t() @ big
    scale = _ratio(moments.diagonal().sum() / members, (flat @ moments @ flat.t()).diagonal().sum()).sqrt()
    energy, total = float(energies[-dim:].sum()), float(energies.sum())
    return Sharing(scale * top.transpose(1, 2) @ weights, inverses @ top / scale, energy / total if total else 1.0)


def refit(heads: Tensor, residual: Tensor, ridge: float = 1e-6) -> Tensor:
    """Return the ridge regression of the residual on the heads, to be added to the output projection.

    Args:
        heads: Z^T Z, (width, width), of the converted heads' output.
        residual: R^T Z, (out_features, width), with R the original output minus the converted one.
        ridge: of the mean of Z's energies.
    """
    damped = heads + ridge * heads.diagonal().mean().clamp_min(1e-300) * torch.eye(len(heads), dtype=heads.dtype)
    more: Tensor = torch.linalg.solve(damped, residual.t()).t()
    return more


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """Return wanted / found, and 1 for dead heads."""
    return torch.where((wanted > 0) & (found > 0), wanted / found.clamp_min(1e-300), torch.ones_like(found))


def _diagonal(blocks: Tensor) -> Tensor:
    """(members, size, size) -> the block-diagonal matrix of them."""
    members, size = blocks.shape[:2]
    out = blocks.new_zeros(members, size, members, size)
    out[torch.arange(members), :, torch.arange(members)] = blocks
    return out.view(members * size, members * size)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of positive semi-definite matrices (..., size, size)."""
    values, vectors = torch.linalg.eigh(_ridged(moments))
    values = values.clamp_min(1e-300).sqrt()
    root = (vectors * values[..., None, :]) @ vectors.transpose(-1, -2)
    return root, (vectors / values[..., None, :]) @ vectors.transpose(-1, -2)


def _ridged(moments: Tensor) -> Tensor:
    trace = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-290)
    return moments + RIDGE * trace * torch.eye(moments.shape[-1], dtype=moments.dtype)
