"""The stock types that hold latent attention: which one holds a model, and the model as one of that type."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..edits import SetConfig
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..few import one_of_each
from ..heads.frames import SLACK
from ..heads.weights import read_weights
from ..homes.fitting import BUILDING, Unfit, class_of, rebuilt
from ..homes.rows import LATENT_HOMES, LatentHome
from ..probe import TOLERANCE, Inputs, default_inputs, largest_difference, quiet, valid
from ..upstream.roles import frequencies
from .shape import Shape
from .source import Source, width_of
from .weights import LatentWeights, lossless

_LAYERS = "num_hidden_layers"
_ROUNDING = 3e-7  # of a frequency: two units in the last place of float32


@dataclass(frozen=True)
class Home:
    """A stock type that holds a model.

    Attributes:
        row: of the table of homes.
        cls: the class of transformers.
    """

    row: LatentHome
    cls: type[PreTrainedModel]


def check_name(home: object) -> None:
    """Refuse what is no home.

    Raises:
        AttnPatchError: so, with the ones there are.
    """
    choices = ("auto", *(row.model_type for row in LATENT_HOMES))
    if home not in choices:
        raise AttnPatchError(f"home is {home!r}; choose from: {', '.join(choices)}.")


def find_home(model: PreTrainedModel, source: Source, name: str) -> Home:
    """Return the first stock type that computes what the model does, tried on its first layer without any loss.

    Args:
        model: only read.
        source: what was read of it.
        name: of a type, or ``auto``.

    Raises:
        UnsupportedArchitecture: there is none, with the reason for each.
    """
    reasons = []
    for row in LATENT_HOMES:
        if name not in ("auto", row.model_type):
            continue
        try:
            home = Home(row, class_of(model, row))
            _check_padding(model, row)
            _prove(model, source, home)
            return home
        except Unfit as error:
            reasons.append(f"{row.model_type} {error}")
    raise UnsupportedArchitecture(f"{type(model).__name__}: no stock latent type holds it: {'; '.join(reasons)}.")


def shape_of(model: PreTrainedModel, source: Source, rank: int, counts: tuple[int, ...], nope: int) -> Shape:
    """Return the shape of a latent for a model."""
    site = source.site
    return Shape(
        site.num_heads, site.head_dim, site.v_head_dim, rank, counts, nope, width_of(model, site), source.query_bias
    )


def lossless_shape(model: PreTrainedModel, source: Source) -> Shape:
    """Return the shape that holds everything: every head's planes in the rotary key, nothing beside it."""
    rank, rope = source.lossless
    half = source.site.head_dim // 2
    return shape_of(model, source, rank, (rope // 2 // half,) * half, 0)


def lossless_weights(model: PreTrainedModel, source: Source, path: str) -> LatentWeights:
    """Return the weights of one module that lose nothing."""
    site = next(s for s in source.sites if s.path == path)
    return lossless(read_weights(model, site), source.frames[path].keys)


def become(
    model: PreTrainedModel, source: Source, home: Home, shape: Shape, weights: Mapping[str, Mapping[str, Tensor]]
) -> PreTrainedModel:
    """Build the model of the home's type around all parameters but those of attention.

    Args:
        model: only read.
        source: what was read of it.
        home: that holds it.
        shape: of the latent.
        weights: path of an attention module -> its parameters.

    Raises:
        Unfit: something cannot be built, or rotates otherwise than it should.
    """
    now, like = source.window, model.config
    wide = shape.fields(now.frequencies, source.theta, now.attention, now.length)
    other = rebuilt(model, home.cls, {**home.row.fields(like), **wide}, {}, instead=weights)
    rotary = next(m for m in other.modules() if frequencies(m))
    wanted = now.frequencies.repeat_interleave(torch.tensor(shape.counts))
    for found in frequencies(rotary).values():
        if found.shape != wanted.shape or bool(((found.cpu() - wanted).abs() > _ROUNDING * wanted).any()):
            raise Unfit("rotates by other frequencies than its config says")
    return other


def blank(source: Source, shape: Shape) -> dict[str, dict[str, Tensor]]:
    """Return parameters of the right shapes that take no memory, for a model that is not to compute."""
    site, width = source.site, shape.width + 1
    empty = LatentWeights(
        query=torch.empty(site.num_heads, shape.nope_dim + shape.rope_dim, width, device="meta"),
        latent=torch.empty(shape.rank - 1, width, device="meta"),
        key=torch.empty(shape.rope_dim, width, device="meta"),
        up=torch.empty(site.num_heads, shape.nope_dim + site.v_head_dim, shape.rank, device="meta"),
        output=torch.empty(shape.width, site.num_heads, site.v_head_dim, device="meta"),
        output_bias=None,
    )
    sizes = {name: tensor.shape for name, tensor in shape.tensors(empty, torch.float32).items()}
    return {s.path: {name: torch.zeros(()).expand(size) for name, size in sizes.items()} for s in source.sites}


def _check_padding(model: PreTrainedModel, row: LatentHome) -> None:
    """Refuse a home that would load another embedding of the padding token than was saved.

    Raises:
        Unfit: so.
    """
    table = model.get_input_embeddings()
    number = getattr(table, "padding_idx", None)
    if row.keeps_padding or number is None:
        return
    if bool((table.weight[number] != 0).any()):
        raise Unfit(
            f"sets the embedding of the padding token ({number}) to zero when it loads, and it is not zero here"
        )


def _prove(model: PreTrainedModel, source: Source, home: Home) -> None:
    """Compare the logits of the first layer of each kind, and of the home that holds it without loss.

    Raises:
        Unfit: they differ.
    """
    short = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # edits write into no parameter
    cut = one_of_each(short, [s.path for s in source.sites])
    if cut is not None:
        cut.run(short)
        SetConfig("", _LAYERS, cut.count).run(short)
    sites = tuple(s for s in source.sites if any(s.path == path for path, _ in short.named_modules()))
    few = Source(sites, source.frames, source.window, source.theta, source.query_bias)
    shape = lossless_shape(short, few)
    dtype = next(iter(model.parameters())).dtype
    inputs = default_inputs(short)
    weights = {s.path: stored(shape, lossless_weights(short, few, s.path), short, s.path, dtype) for s in sites}
    here = _logits(short, inputs)
    try:
        there = _logits(become(short, few, home, shape, weights), inputs)
    except Unfit:
        raise
    except BUILDING as error:
        raise Unfit(f"does not run: {' '.join(str(error).split())[:200]}") from error
    difference, allowed = largest_difference(here, there), TOLERANCE.get(dtype, 1e-2) * (1 if keeps(dtype) else SLACK)
    if not difference <= allowed:
        raise Unfit(f"computes something else: logits differ by {difference:.2g} of their size, {allowed:.0e} allowed")


def keeps(dtype: torch.dtype) -> bool:
    """Whether weights that are multiplied by a number lose nothing to speak of in a dtype."""
    return torch.finfo(dtype).eps < 1e-6


def stored(
    shape: Shape, weights: LatentWeights, model: PreTrainedModel, path: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the parameters of one module as a model holds them: in its dtype, where the module was."""
    device = next(iter(model.get_submodule(path).parameters())).device
    return {name: t.detach().to(device, dtype).contiguous() for name, t in shape.tensors(weights, dtype).items()}


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    with quiet(model), torch.no_grad():
        return valid(model, model(**inputs)[0], inputs)
