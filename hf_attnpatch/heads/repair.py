"""Repairs merged heads: refits output projections in closed form, refines modules, measures the damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.registry import dense
from ..edits import SetAttention, Write, undo_all, write_all
from ..errors import AttnPatchError
from ..functional.merging import refit
from ..interruption import ensured
from ..progress import track
from ..sites import Site
from . import calibration as cal
from . import calibration_text
from .calibration_text import Batch
from .outcome import Conversion, Recipe
from .refine import Gap, gap, refine, target
from .replay import Call, Observer, Streams, Taps
from .weights import HeadWeights, has_bias, read_weights

TOKENS_A_STEP = 1024  # of refinement; twice as many take four times as long where caches overflow
TOKENS_TO_REFIT = 16_384  # at least, and 32 for each input of the output projection
TOKENS_TO_REFINE = 16_384


def refit_outputs(
    model: PreTrainedModel,
    sites: Sequence[Site],
    text: Sequence[Batch],
    done: Conversion,
    feed: cal.Feed | None = None,
) -> None:
    """Refit the output projections on the attention that the shared heads really give."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    originals = {site.path: read_weights(model, site) for site in sites}

    def see(site: Site, call: Call, own: Streams) -> None:
        socket, shared = Taps(model, site), done.weights[site.path]
        wanted = originals[site.path].project(own.heads.float())
        heads = socket.run(call, **shared.rewrites()).heads.float()
        residual, z = (wanted - shared.project(heads)), heads.flatten(1)
        if shared.output_bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        gram, cross = (z.t() @ z).double().cpu(), (residual.t() @ z).double().cpu()
        before = sums.get(site.path)
        sums[site.path] = (gram, cross) if before is None else (before[0] + gram, before[1] + cross)

    width = max(s.num_heads * s.v_head_dim for s in sites)
    enough = calibration_text.first(calibration_text.split(text, sites), max(TOKENS_TO_REFIT, 32 * width))
    cal.stream(model, sites, enough, see, "refitting outputs", feed)
    for site in sites:
        shared, more = done.weights[site.path], refit(*sums.pop(site.path))
        bias = shared.output_bias
        if bias is not None:
            bias, more = bias + more[:, -1], more[:, :-1]
        output = shared.output + more.reshape(shared.output.shape)
        done.weights[site.path] = replace(shared, output=output, output_bias=bias)


def repair(
    model: PreTrainedModel,
    sites: Sequence[Site],
    samples: Sequence[Batch],
    recipe: Recipe,
    done: Conversion,
    merged: Mapping[str, HeadWeights],
    feed: Callable[[], cal.Feed] | None = None,
) -> None:
    """Measure the damage of some modules on text that no step sees and, for `refined`, refine them.

    Args:
        model: left as it was.
        sites: its modules.
        samples: what :func:`samples_of` gives.
        recipe: what to do.
        done: the conversion so far.
        merged: weights before their output projections were refitted.
        feed: gives which layers run in a pass; None for all.
    """
    steps = samples[1:]
    tokens = sum(batch["input_ids"].numel() for batch in samples)
    with eager(model):
        for part in cal.chunks(sites, lambda s: 4 * tokens * s.num_heads * s.head_dim):
            calls: dict[str, list[Call]] = {site.path: [] for site in part}
            cal.stream(model, part, samples, _keeper(calls), "recording inputs", None if feed is None else feed())
            for site in track(part, "refining" if steps else "measuring damage"):
                _improve(model, site, calls.pop(site.path), recipe, done, merged[site.path])


def _keeper(calls: dict[str, list[Call]]) -> Observer:
    return lambda site, call, _: calls[site.path].append(call)


def _improve(
    model: PreTrainedModel, site: Site, calls: list[Call], recipe: Recipe, done: Conversion, merged: HeadWeights
) -> None:
    """Refine one module if the recipe says so, and record the distance of each stage from the original."""
    socket, original, path = Taps(model, site), read_weights(model, site), site.path
    held = target(socket, original, calls[0])
    gaps: dict[str, Gap] = {"merged": gap(socket, merged, held)}
    if done.weights[path] is not merged:
        gaps["refitted"] = gap(socket, done.weights[path], held)
    if calls[1:]:
        biased = [has_bias(model, site, getattr(site.layout, n)) for n in ("query", "key", "value")]
        seconds = float("inf") if recipe.seconds is None else recipe.seconds / done.total
        targets = [target(socket, original, call) for call in calls[1:]]
        better, _ = refine(socket, done.weights[path], targets, steps=recipe.steps, biased=biased, seconds=seconds)
        before, after = gaps["refitted"], gap(socket, better, held)
        helps = _total(after) < _total(before)  # on unseen text; otherwise the closed form stays
        gaps["refined"] = after if helps else before
        done.weights[path] = better if helps else done.weights[path]
    done.layers[path] = replace(done.layers[path], gaps=gaps)


def _total(found: Gap) -> float:
    return found.output + (found.attention or 0.0)


def samples_of(text: Sequence[Batch], recipe: Recipe, done: Conversion) -> list[Batch]:
    """Return what damage is measured on and, for `refined`, what it is refined on.

    Batches of about `TOKENS_A_STEP` tokens, `TOKENS_TO_REFINE` in all and one more, whole windows first.
    """
    found = _samples(text, done)
    return found if recipe.method == "refined" else found[:1]


def _samples(text: Sequence[Batch], done: Conversion) -> list[Batch]:
    parts: list[Batch] = []
    for batch in text:
        rows = max(1, TOKENS_A_STEP // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            parts.append({name: tensor[start : start + rows] for name, tensor in batch.items()})
    parts.sort(key=lambda part: -part["input_ids"].numel())  # stable, so still shuffled
    tokens = TOKENS_TO_REFINE + parts[0]["input_ids"].numel()
    if len(parts) > 1:
        return calibration_text.first(parts, tokens)
    half = len(parts[0]["input_ids"]) // 2
    if half:
        return [{n: t[:half] for n, t in parts[0].items()}, {n: t[half:] for n, t in parts[0].items()}]
    done.notes.append("one sequence of calibration text: damage is measured on what refinement saw")
    return parts * 2


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Let modules return their attention weights, if the family has eager attention."""
    found, writes = model.config._attn_implementation, list[Write]()
    with ensured(lambda: undo_all(writes)):
        try:
            write_all(model, [SetAttention("", dense(str(found)))], writes)
        except (ValueError, AttnPatchError):
            undo_all(writes)
        yield
