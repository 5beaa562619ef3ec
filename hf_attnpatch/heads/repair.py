"""Repairs merged heads: refits output projections in closed form, refines modules, measures the damage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
from .refine import Form, Gap, W, gap, refine, target
from .replay import Call, Observer, Streams, Taps
from .weights import read_weights

TOKENS_A_STEP = 1024  # of refinement; twice as many take four times as long where caches overflow
TOKENS_TO_REFIT = 16_384  # at least, and 32 for each input of the output projection
TOKENS_TO_REFINE = 16_384


@dataclass(frozen=True)
class Refinement:
    """How long to refine.

    Attributes:
        steps: of Adam for each module; 0 measures only.
        seconds: for each module.
    """

    steps: int
    seconds: float = float("inf")


def refit_outputs(
    model: PreTrainedModel,
    forms: Sequence[Form[W]],
    text: Sequence[Batch],
    weights: dict[str, W],
    feed: cal.Feed | None = None,
) -> None:
    """Refit the output projections on the attention that converted modules really give.

    Args:
        model: that holds the original modules.
        forms: of the modules.
        text: calibration batches.
        weights: by path; their output projections are replaced by better ones.
        feed: which layers run; None for all.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    by_path = {form.site.path: form for form in forms}
    sites = [form.site for form in forms]
    originals = {site.path: read_weights(model, site) for site in sites}

    def see(site: Site, call: Call, own: Streams) -> None:
        found = weights[site.path]
        wanted = originals[site.path].project(own.heads.float())
        heads, _ = by_path[site.path].attend(found, call)
        residual, z = (wanted - found.project(heads)), heads.flatten(1)
        if found.output_bias is not None:
            z = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        gram, cross = (z.t() @ z).double().cpu(), (residual.t() @ z).double().cpu()
        before = sums.get(site.path)
        sums[site.path] = (gram, cross) if before is None else (before[0] + gram, before[1] + cross)

    width = max(s.num_heads * s.v_head_dim for s in sites)
    enough = calibration_text.first(calibration_text.split(text, sites), max(TOKENS_TO_REFIT, 32 * width))
    cal.stream(model, sites, enough, see, "refitting outputs", feed)
    for site in sites:
        found, more = weights[site.path], refit(*sums.pop(site.path))
        bias = found.output_bias
        if bias is not None:
            bias, more = bias + more[:, -1], more[:, :-1]
        output = found.output + more.reshape(found.output.shape)
        weights[site.path] = replace(found, output=output, output_bias=bias)


def repair(
    model: PreTrainedModel,
    forms: Sequence[Form[W]],
    batches: Sequence[Batch],
    how: Refinement,
    stages: Mapping[str, dict[str, W]],
    feed: Callable[[], cal.Feed] | None = None,
) -> dict[str, dict[str, Gap]]:
    """Measure the damage of some modules on text that no step sees and, where asked, refine them.

    Args:
        model: that holds the original modules.
        forms: of the modules.
        batches: what :func:`samples` gives: the damage is measured on the first, the others are for steps.
        how: to refine.
        stages: name of a stage (`merged`, `refitted`) -> weights by path; better ones replace those of the last.
        feed: gives which layers run in a pass; None for all.

    Returns:
        Path -> stage -> distance from the original; `refined` is the last where there were steps.
    """
    batches = batches if how.steps else batches[:1]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    by_path, gaps = {form.site.path: form for form in forms}, dict[str, dict[str, Gap]]()
    with eager(model):
        for part in cal.chunks([f.site for f in forms], lambda s: 4 * tokens * s.num_heads * s.head_dim):
            calls: dict[str, list[Call]] = {site.path: [] for site in part}
            cal.stream(model, part, batches, keeper(calls), "recording inputs", None if feed is None else feed())
            for site in track(part, "refining" if batches[1:] else "measuring damage"):
                gaps[site.path] = _improve(model, by_path[site.path], calls.pop(site.path), how, stages)
    return gaps


def keeper(calls: dict[str, list[Call]]) -> Observer:
    """Return what keeps the calls of each module that is in ``calls``."""
    return lambda site, call, _: calls[site.path].append(call)


def _improve(
    model: PreTrainedModel, form: Form[W], calls: list[Call], how: Refinement, stages: Mapping[str, dict[str, W]]
) -> dict[str, Gap]:
    """Refine one module where there are calls to do it on, and say how far each stage is from the original."""
    site = form.site
    socket, original = Taps(model, site), read_weights(model, site)
    held = target(socket, original, calls[0])
    gaps = {name: gap(form, weights[site.path], held) for name, weights in stages.items()}
    if calls[1:]:
        last = list(stages)[-1]
        targets = [target(socket, original, call) for call in calls[1:]]
        better, _ = refine(form, stages[last][site.path], targets, steps=how.steps, seconds=how.seconds)
        before, after = gaps[last], gap(form, better, held)
        helps = after.total < before.total  # on text that no step has seen; otherwise the closed form stays
        gaps["refined"] = after if helps else before
        if helps:
            stages[last][site.path] = better
    return gaps


def samples(text: Sequence[Batch], notes: list[str]) -> list[Batch]:
    """Return batches of about `TOKENS_A_STEP` tokens, `TOKENS_TO_REFINE` in all and one more, whole windows first."""
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
    notes.append("one sequence of calibration text: damage is measured on what refinement saw")
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
