"""What a latent is chosen by: covariances of keys and values, energies of queries, attention by distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError, CalibrationError
from ..functional.finite import all_finite
from ..functional.latent import Seen, assumed_mass, by_distance, mean_rotation
from ..heads import calibration as cal
from ..heads.calibration_text import Batch, first, split
from ..heads.estimate import input_sizes, sized
from ..heads.repair import eager
from ..heads.replay import Call, Streams
from ..heads.weights import HeadWeights, read_weights
from ..sites import Site
from .source import Source

TOKENS = 16_384  # at least, and 32 for each dimension of keys and values
MASS_TOKENS = 8192  # whose attention tells how far it looks


@dataclass
class _Sums:
    """Sums over tokens, float64."""

    states: Tensor
    mean: Tensor
    query: Tensor
    mass: Tensor
    tokens: int = 0
    attended: int = 0

    def add(self, own: Streams, probabilities: Tensor, call: Call) -> None:
        """Add what a module was seen to compute with; of padding, only attention has to be left out."""
        states = torch.cat([own.key.flatten(1), own.value.flatten(1)], dim=1).float()
        self.states += (states.t() @ states).double().cpu()
        self.mean += states.double().sum(0).cpu()
        self.query += own.query.double().square().sum(0).cpu()
        self.tokens += len(states)
        if self.attended < MASS_TOKENS:
            seen = probabilities.float()
            if call.tokens is not None:
                seen = seen * call.tokens[:, None, :, None]
            mass = by_distance(seen.sum(0)).double().cpu()
            self.mass[:, : mass.shape[1]] += mass
            self.attended += len(states)


def measured(model: PreTrainedModel, source: Source, text: Sequence[Batch]) -> dict[str, Seen]:
    """Measure all modules in one pass over a text, with eager attention, which gives its weights.

    Raises:
        AttnPatchError: the family has no eager attention that gives them, or a module never ran.
        CalibrationError: activations are not finite.
    """
    longest = max(batch["input_ids"].shape[1] for batch in text)
    sums = {site.path: _no_sums(site, longest) for site in source.sites}

    def see(site: Site, call: Call, own: Streams) -> None:
        if own.probabilities is None:
            raise AttnPatchError(
                f"{site.path}: {site.kind} gives no attention weights, which choose a latent; use method='principal'."
            )
        sums[site.path].add(own, own.probabilities, call)
        if not all_finite(sums[site.path].states):
            raise CalibrationError(
                f"{site.path}: activations on the calibration text are not finite; check the weights and the dtype."
            )

    with eager(model):
        enough = first(split(text, source.sites), max(TOKENS, 32 * source.cached))
        cal.stream(model, source.sites, enough, see, "measuring attention")
    silent = next((path for path, found in sums.items() if not found.tokens), None)
    if silent is not None:
        raise AttnPatchError(f"{silent}: did not run on the calibration text, or on padding only.")
    return {s.path: _seen(source, s, sums[s.path], read_weights(model, s)) for s in source.sites}


def assumed(model: PreTrainedModel, source: Source) -> dict[str, Seen]:
    """Return what independent inputs would give, each as large as on random tokens, looked at as 1 / (1 + distance)."""
    sizes = input_sizes(model, source.sites)
    found = {}
    for site in source.sites:
        weights, planes = read_weights(model, site), source.frames[site.path].keys.planes
        query = sized(weights.query, sizes[site.path])
        states = torch.cat([weights.key.flatten(0, 1), weights.value.flatten(0, 1)])
        wide = sized(states, sizes[site.path])
        wide[:, -1] = 0  # a bias is a mean, not a spread
        energy = query.square().sum(-1)[:, planes].sum(-1)
        mass = assumed_mass(site.num_heads, source.window.length)
        rho = mean_rotation(mass, source.window.frequencies)
        found[site.path] = Seen(wide @ wide.t(), states[:, -1], energy, rho, _output(site, weights))
    return found


def _no_sums(site: Site, length: int) -> _Sums:
    wide = site.num_kv_heads * (site.head_dim + site.v_head_dim)
    heads = site.num_heads
    sizes = {"states": (wide, wide), "mean": (wide,), "query": (heads, site.head_dim), "mass": (heads, length)}
    zeros = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    return _Sums(zeros["states"], zeros["mean"], zeros["query"], zeros["mass"])


def _seen(source: Source, site: Site, sums: _Sums, weights: HeadWeights) -> Seen:
    n, planes = sums.tokens, source.frames[site.path].keys.planes
    mean = sums.mean / n
    return Seen(
        states=sums.states / n - mean[:, None] * mean,
        mean=mean,
        query=(sums.query / n)[:, planes].sum(-1),
        rho=mean_rotation(sums.mass, source.window.frequencies),
        output=_output(site, weights),
    )


def _output(site: Site, weights: HeadWeights) -> Tensor:
    """W^T W summed over the query heads of each key-value head, (num_kv_heads, v_head_dim, v_head_dim)."""
    each = torch.einsum("xha,xhb->hab", weights.output, weights.output)
    return each.view(site.num_kv_heads, -1, *each.shape[1:]).sum(1)
