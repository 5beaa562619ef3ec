"""From a budget to the weights of every module: measure, choose, split, refit, refine. The model is not touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from ..functional.latent import Components, Seen, Split, choose_planes, components, split
from ..heads import calibration as cal
from ..heads import calibration_text
from ..heads.calibration_text import Batch
from ..heads.damage import LayerDamage
from ..heads.outcome import Clock
from ..heads.refine import Gap, Target, gap, target
from ..heads.repair import Refinement, eager, keeper, refit_outputs, repair, samples
from ..heads.replay import Call, Taps
from ..heads.weights import read_weights
from ..probe import quiet
from ..progress import track
from ..sites import Site
from .form import LatentForm
from .home import Home, become, blank, shape_of
from .shape import Shape
from .source import Source
from .statistics import assumed, measured
from .weights import LatentWeights, compressed

ROTARY = (0.25, 0.375, 0.5)  # shares of a budget that are tried for the rotary key
WEIGHTS = (0.1, 0.2, 0.5)  # of unrotated keys beside values, tried for each layer
BY_DEFAULT = (0.375, 0.2)  # where nothing can be tried


@dataclass(frozen=True)
class Budget:
    """How large the latent is to be.

    Attributes:
        total: numbers a token and layer, rank and rotary width together.
        rope_dim: the rotary width; None to choose it.
    """

    total: int
    rope_dim: int | None

    def widths(self) -> list[int]:
        """Return the rotary widths to try."""
        if self.rope_dim is not None:
            return [self.rope_dim]
        tried = {max(2, 2 * round(self.total * share / 2)) for share in ROTARY}
        return sorted(n for n in tried if self.total - n >= 2)


@dataclass(frozen=True)
class How:
    """How to convert; the fields of :class:`~hf_attnpatch.Latent` that matter here."""

    method: str
    seed: int
    steps: int
    seconds: float | None


@dataclass
class Conversion(Clock):
    """Weights by attention module, and what they cost."""

    shape: Shape | None = None
    weights: dict[str, LatentWeights] = field(default_factory=dict)
    layers: dict[str, LayerDamage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    """What is known of a model: of each module by path."""

    seen: Mapping[str, Seen]
    parts: Mapping[str, Components]


def convert(
    model: PreTrainedModel, source: Source, home: Home, budget: Budget, how: How, text: Sequence[Batch] | None
) -> Conversion:
    """Work out the weights of every module.

    Args:
        model: in any mode; left as it was.
        source: what was read of it.
        home: the type it is to become.
        budget: of the cache.
        how: to convert.
        text: calibration batches; None for ``principal``.

    Raises:
        AttnPatchError: too little text, activations that are not finite.
    """
    done = Conversion()
    text = None if text is None else calibration_text.shuffled(text, how.seed)
    with quiet(model):
        with done.clock("statistics"):
            seen = assumed(model, source) if text is None else measured(model, source, text)
            heads = source.site.num_kv_heads
            parts = {p: components(seen[p], source.frames[p].keys.planes, heads) for p in seen}
        known = _Known(seen, parts)
        with done.clock("choosing"):
            shape, weights, energies = _chosen(model, source, home, budget, known, text, done.notes)
        gaps: Mapping[str, Mapping[str, Gap]] = {}
        if text is not None:
            gaps, weights = _repaired(model, source, home, shape, how, text, weights, done)
    done.shape, done.weights = shape, weights
    said = f"rank {shape.rank}, rotary {shape.rope_dim}"
    for site in source.sites:
        energy, frame = energies[site.path], source.frames[site.path].how
        done.layers[site.path] = LayerDamage(site.path, (), *energy, gaps.get(site.path, {}), frame, said)
    return done


def _repaired(
    model: PreTrainedModel,
    source: Source,
    home: Home,
    shape: Shape,
    how: How,
    text: Sequence[Batch],
    weights: dict[str, LatentWeights],
    done: Conversion,
) -> tuple[Mapping[str, Mapping[str, Gap]], dict[str, LatentWeights]]:
    """Refit the output projections, refine, and measure the damage."""
    forms, now = _forms(model, source, home, shape), dict(weights)
    with done.clock("refit"), eager(model):  # the home runs eagerly, and has to be given masks
        refit_outputs(model, forms, text, now)
    steps = how.steps if how.method == "refined" else 0
    longest = float("inf") if how.seconds is None else how.seconds / len(source.sites)
    stages = {"compressed": weights, "refitted": now}
    with done.clock("refinement" if steps else "damage"):
        gaps = repair(model, forms, samples(text, done.notes), Refinement(steps, longest), stages)
    return gaps, now


def _forms(model: PreTrainedModel, source: Source, home: Home, shape: Shape) -> list[LatentForm]:
    with eager(model):
        other = become(model, source, home, shape, blank(source, shape)).eval()
    return [LatentForm(site, other, shape) for site in source.sites]


def _chosen(
    model: PreTrainedModel,
    source: Source,
    home: Home,
    budget: Budget,
    known: _Known,
    text: Sequence[Batch] | None,
    notes: list[str],
) -> tuple[Shape, dict[str, LatentWeights], dict[str, tuple[float, float]]]:
    """Choose the rotary width, the planes, and the weight of unrotated keys in each layer."""
    gains = [part.gain for part in known.parts.values()]
    if text is None:
        width = budget.rope_dim or min(budget.widths(), key=lambda n: abs(n - BY_DEFAULT[0] * budget.total))
        shape = _shape(model, source, budget, gains, width)
        made = {s.path: _split(model, source, known, s, shape, BY_DEFAULT[1]) for s in source.sites}
        return shape, {p: w for p, (w, _) in made.items()}, {p: e for p, (_, e) in made.items()}
    calls: dict[str, list[Call]] = {site.path: [] for site in source.sites}
    batch = samples(text, [])[1]  # the first is kept for the damage
    best: tuple[float, Shape, dict[str, LatentWeights], dict[str, tuple[float, float]]] | None = None
    with eager(model):
        cal.stream(model, source.sites, [batch], keeper(calls), "recording inputs")
        wanted = {s.path: target(Taps(model, s), read_weights(model, s), calls[s.path][0]) for s in source.sites}
    for width in track(budget.widths(), "choosing the rotary width"):
        shape = _shape(model, source, budget, gains, width)
        forms = _forms(model, source, home, shape)
        found = [_best_weight(model, source, known, form, shape, wanted[form.site.path]) for form in forms]
        error = sum(each[0] for each in found)
        if best is None or error < best[0]:
            paths = [form.site.path for form in forms]
            made_ = {p: each[1] for p, each in zip(paths, found, strict=True)}
            best = (error, shape, made_, {p: each[2] for p, each in zip(paths, found, strict=True)})
    assert best is not None
    notes.append(f"rotary width {best[1].rope_dim} of {budget.total}: least error of those tried on the text")
    return best[1:]


def _shape(model: PreTrainedModel, source: Source, budget: Budget, gains: Sequence[Tensor], width: int) -> Shape:
    counts = choose_planes(gains, width // 2)
    return shape_of(model, source, budget.total - width, counts, source.site.head_dim)


def _best_weight(
    model: PreTrainedModel, source: Source, known: _Known, form: LatentForm, shape: Shape, wanted: Target
) -> tuple[float, LatentWeights, tuple[float, float]]:
    """Return the error, the weights and the energies kept, of the weight of unrotated keys that serves best."""
    found = []
    for share in WEIGHTS:
        weights, energy = _split(model, source, known, form.site, shape, share)
        found.append((gap(form, weights, wanted).total, weights, energy))
    return min(found, key=lambda each: each[0])


def _split(
    model: PreTrainedModel, source: Source, known: _Known, site: Site, shape: Shape, share: float
) -> tuple[LatentWeights, tuple[float, float]]:
    seen, planes = known.seen[site.path], source.frames[site.path].keys.planes
    attention = source.window.attention
    maps: Split = split(seen, known.parts[site.path], planes, shape.counts, shape.rank - 1, share, attention)
    original = read_weights(model, site)
    bias = original.output_bias
    bias = original.output.new_zeros(len(original.output)) if bias is None else bias  # every home has one
    return compressed(original, maps, seen.mean, bias), maps.energy
