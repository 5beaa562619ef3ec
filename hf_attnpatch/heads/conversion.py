"""Converts multi-head attention to shared key-value heads: measure, group, merge, refit, refine.

The stages are those of :mod:`functional.merging`; :mod:`estimate` gives what they need of the model. Every module is
converted on its inputs in the original model, so that modules are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .estimate import brief, estimate, find_frames, input_sizes, unaligned
from .frames import Symmetries
from .kept import Kept, kept
from .layerwise import Layers, layer_number, layers_of
from .merger import Merger
from .outcome import Conversion, Recipe
from .refine import HeadForm
from .repair import Refinement, eager, refit_outputs, repair, samples
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
    store = kept(recipe, sites, text)
    with quiet(model):
        frames = find_frames(model, sites)
        if text is None:
            _from_weights(model, sites, recipe, frames, store, done)
        else:
            _from_text(model, sites, recipe, frames, text, store, done)
    return done


def _from_weights(
    model: PreTrainedModel,
    sites: Sequence[Site],
    recipe: Recipe,
    frames: Mapping[str, Symmetries],
    store: Kept,
    done: Conversion,
) -> None:
    """Convert one module after the other; no more than the moments of one are held."""
    left = [site for site in sites if not store.recall(site, done)]
    with done.clock("statistics"):
        sizes = input_sizes(model, left) if left else {}
    for site in track(left, "merging heads"):
        with done.clock("statistics"):
            moments = estimate(model, [site], None, frames, sizes)
        with done.clock("merging"):
            merge(model, site, frames[site.path], moments.pop(site.path), recipe, done)
        store.store(model, site, done)


def _from_text(
    model: PreTrainedModel,
    sites: Sequence[Site],
    recipe: Recipe,
    frames: Mapping[str, Symmetries],
    text: list[Batch],
    store: Kept,
    done: Conversion,
) -> None:
    """Convert as many modules at a time as memory holds the statistics of: all at once, or layer by layer."""
    batches = samples(text, done.notes)
    batches = batches if recipe.method == "refined" else batches[:1]
    parts = list(cal.chunks(sites, lambda s: cal.moments_size(s) + _refit_size(s)))
    layers = (
        layers_of(model, sites, lambda: cal.stream(model, sites, [brief(model)], _nothing, "")) if parts[1:] else None
    )
    if layers is None:
        for part in parts:
            left = [site for site in part if not store.recall(site, done)]
            if left:
                _converted(model, left, recipe, frames, text, batches, store, done, None)
        return
    text = calibration_text.split(text, sites)  # the same batches for all layers
    by_layer: dict[int, list[Site]] = {}
    for site in sites:
        by_layer.setdefault(layer_number(layers, site), []).append(site)
    for number in track(range(max(by_layer) + 1), "converting layers"):
        left = [site for site in by_layer.get(number, []) if not store.recall(site, done)]
        if left:
            _converted(model, left, recipe, frames, text, batches, store, done, layers)
        elif number < max(by_layer):
            cal.stream(model, sites[:1], text, _nothing, "", layers.running("text"))
            with eager(model):
                cal.stream(model, sites[:1], batches, _nothing, "", layers.running("samples"))
        layers.go_on()


def _nothing(*_: object) -> None:
    """See a call, and do nothing."""


def _converted(
    model: PreTrainedModel,
    part: Sequence[Site],
    recipe: Recipe,
    frames: Mapping[str, Symmetries],
    text: Sequence[Batch],
    batches: Sequence[Batch],
    store: Kept,
    done: Conversion,
    layers: Layers | None,
) -> None:
    with done.clock("statistics"):
        moments = estimate(model, part, text, frames, feed=None if layers is None else layers.running("text"))
    with done.clock("merging"):
        for site in track(part, "merging heads"):
            merge(model, site, frames[site.path], moments.pop(site.path), recipe, done)
    forms = [_form(model, site) for site in part]
    now = {site.path: done.weights[site.path] for site in part}
    stages = {"merged": dict(now)}
    if recipe.method in ("calibrated", "refined"):
        with done.clock("refit"):
            refit_outputs(model, forms, text, now, None if layers is None else layers.running("text", keep=False))
        stages["refitted"] = now
    steps = recipe.steps if recipe.method == "refined" else 0
    how = Refinement(steps, float("inf") if recipe.seconds is None else recipe.seconds / done.total)
    with done.clock("refinement" if steps else "damage"):
        feed = None if layers is None else lambda: layers.running("samples")
        gaps = repair(model, forms, batches, how, stages, feed)
    done.weights.update(stages.get("refitted", stages["merged"]))
    for site in part:
        done.layers[site.path] = replace(done.layers[site.path], gaps=gaps[site.path])
        store.store(model, site, done)


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
