"""Converts multi-head attention to shared key-value heads: measure, group, merge, refit, refine.

The stages are those of :mod:`functional.merging`; :mod:`estimate` gives what they need of the model. Every module is
converted on its inputs in the original model, so that modules are independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..functional.grouping import METHODS as PLAIN
from ..functional.grouping import resize_heads
from ..probe import quiet
from ..progress import track
from ..sites import Site
from . import calibration as cal
from . import calibration_text
from .calibration import Moments
from .calibration_text import Batch
from .damage import LayerDamage
from .estimate import estimate, find_frames, unaligned
from .frames import Symmetries
from .merger import Merger
from .outcome import Conversion, Recipe
from .refine import HeadForm
from .repair import Refinement, refit_outputs, repair
from .replay import Taps
from .weights import HeadWeights, has_bias, read_weights


def convert(model: PreTrainedModel, sites: Sequence[Site], recipe: Recipe, text: Sequence[Batch] | None) -> Conversion:
    """Compute the shared weights of every attention module.

    Args:
        model: in any mode; left unchanged.
        sites: self-attention modules with the key-value heads to share.
        recipe: the settings of the conversion.
        text: calibration batches, or None for a method that needs none.

    Raises:
        AttnPatchError: too little text, non-finite activations, or groups that a family cannot have.
    """
    done = Conversion(total=len(sites))
    text = None if text is None else calibration_text.shuffled(text, recipe.seed)
    with quiet(model):
        frames = find_frames(model, sites)
        for part in cal.chunks(sites, lambda s: cal.moments_size(s) + _refit_size(s)):
            with done.clock("statistics"):
                moments = estimate(model, part, text, frames)
            with done.clock("merging"):
                for site in track(part, "merging heads"):
                    merge(model, site, frames[site.path], moments.pop(site.path), recipe, done)
            if text is not None:
                _repaired(model, part, text, recipe, done)
    return done


def _repaired(
    model: PreTrainedModel, part: Sequence[Site], text: Sequence[Batch], recipe: Recipe, done: Conversion
) -> None:
    forms = [_form(model, site) for site in part]
    now = {site.path: done.weights[site.path] for site in part}
    stages = {"merged": dict(now)}
    if recipe.method in ("calibrated", "refined"):
        with done.clock("refit"):
            refit_outputs(model, forms, text, now)
        stages["refitted"] = now
    steps = recipe.steps if recipe.method == "refined" else 0
    how = Refinement(steps, float("inf") if recipe.seconds is None else recipe.seconds / done.total)
    with done.clock("refinement" if steps else "damage"):
        gaps = repair(model, forms, text, how, stages, done.notes)
    done.weights.update(stages.get("refitted", stages["merged"]))
    for path, found in gaps.items():
        done.layers[path] = replace(done.layers[path], gaps=found)


def _form(model: PreTrainedModel, site: Site) -> HeadForm:
    biased = [has_bias(model, site, getattr(site.layout, name)) for name in ("query", "key", "value")]
    return HeadForm(Taps(model, site), biased)


def _refit_size(site: Site) -> int:
    return 24 * (site.num_heads * site.v_head_dim) ** 2


def merge(
    model: PreTrainedModel, site: Site, frames: Symmetries, moments: Moments, recipe: Recipe, done: Conversion
) -> None:
    """Choose the groups of one module and merge their heads."""
    weights = read_weights(model, site)
    plain = recipe.method in PLAIN
    weights = weights.folded() if frames.folds and weights.output_bias is not None and not plain else weights
    merger = Merger(site, frames, moments, weights, recipe.method)
    groups = merger.groups(recipe.num_kv_heads, recipe.grouping)
    query, key, value, output = weights.query.clone(), [], [], weights.output.clone()
    kept = []
    for group in groups:
        members, heads = list(group), weights.query_heads(group)
        keys, values = merger.keys(group), merger.values(group)
        kept.append((keys.energy, values.energy))
        if plain:
            key.append(_resized(weights.key[members], recipe.method))
            value.append(_resized(weights.value[members], recipe.method))
            continue
        owner = torch.arange(len(group)).repeat_interleave(len(heads) // len(group))
        query[heads] = torch.einsum("hab,hbx->hax", keys.reader[owner], weights.query[heads])
        key.append(torch.einsum("jab,jbx->ax", keys.shared, weights.key[members]))
        value.append(torch.einsum("jab,jbx->ax", values.shared, weights.value[members]))
        output[:, heads] = torch.einsum("xha,hab->xhb", weights.output[:, heads], values.reader[owner])
    done.weights[site.path] = HeadWeights(
        query, torch.stack(key), torch.stack(value), output, weights.output_bias, tuple(groups)
    )
    energy = torch.tensor(kept).mean(0).tolist()
    done.layers[site.path] = LayerDamage(site.path, tuple(groups), energy[0], energy[1], {}, frames.how)


def _resized(rows: Tensor, method: str) -> Tensor:
    """Merge (members, dim, in_features + 1) into one by `first`, `mean` or `mean_rescaled`, biases separately."""
    weight, bias = resize_heads(rows[..., :-1], 1, method), resize_heads(rows[..., -1], 1, method)
    return torch.cat([weight[0], bias[0][:, None]], dim=1)


__all__ = ["Conversion", "Recipe", "convert", "unaligned"]
