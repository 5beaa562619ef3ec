"""What of a model's attention can become a latent, or why it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import UnsupportedArchitecture
from ..heads.estimate import find_frames
from ..heads.frames import Symmetries
from ..heads.weights import has_bias
from ..homes.checks import rotary_alone
from ..homes.fitting import current
from ..layouts import weight_rows
from ..probe import check_in_memory, quiet
from ..rope.config import declared_window, window_of
from ..rope.parameters import Window
from ..sites import Site

_GROUPED = "GroupedQuery (patch_grouped_query) makes its cache smaller as well"


@dataclass(frozen=True)
class Source:
    """A model with grouped or multi-head attention in which every plane of every head is rotated.

    Attributes:
        sites: its attention modules, all of one size.
        frames: by path, what may be done to their heads.
        window: what its rotary module does.
        theta: base of its rotary frequencies.
        query_bias: whether queries have a bias.
    """

    sites: tuple[Site, ...]
    frames: Mapping[str, Symmetries]
    window: Window
    theta: float
    query_bias: bool

    @property
    def site(self) -> Site:
        """The first module, which is as large as any."""
        return self.sites[0]

    @property
    def cached(self) -> int:
        """Numbers that the cache holds for each token and layer."""
        return self.site.num_kv_heads * (self.site.head_dim + self.site.v_head_dim)

    @property
    def lossless(self) -> tuple[int, int]:
        """Rank and rotary width that hold everything; one channel of the latent is a constant."""
        kv = self.site.num_kv_heads
        return kv * self.site.v_head_dim + 1, kv * self.site.head_dim


def read_source(model: PreTrainedModel, anatomy: Anatomy) -> Source:
    """Read a model, which is run on a few tokens and left as it was.

    Raises:
        UnsupportedArchitecture: its attention, its positions or its windows cannot be said of a latent.
    """
    rotary_alone(anatomy)
    _same_everywhere(model, anatomy)
    sites = anatomy.sites
    path, why = next(iter({**anatomy.unread, **anatomy.other}.items()), ("", ""))
    if why or not sites:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: {path}: {why or 'no module has key and value heads'}; a latent takes the place "
            "of the keys and values of all layers"
        )
    odd = next((s for s in sites if _size(s) != _size(sites[0])), None)
    if odd is not None:
        raise UnsupportedArchitecture(
            f"{odd.path}: has other heads than {sites[0].path}; one rank and one rotary width serve all. {_GROUPED}"
        )
    blind = next((s for s in sites if not s.output), None)
    if blind is not None:
        raise UnsupportedArchitecture(f"{blind.path}: {blind.kind} has no output projection that was recognised")
    window = _window(model, anatomy)
    check_in_memory(model)
    with quiet(model):
        frames = find_frames(model, sites)
    for site in sites:
        _check_frames(site, frames[site.path])
    biased = any(has_bias(model, site, site.layout.query) for site in sites)
    return Source(sites, frames, window, float(model.config.rope_parameters["rope_theta"]), biased)


def _size(site: Site) -> tuple[int, ...]:
    return site.num_heads, site.num_kv_heads, site.head_dim, site.v_head_dim


def width_of(model: PreTrainedModel, site: Site) -> int:
    """Return how many features a module's projections read."""
    return weight_rows(model.get_submodule(f"{site.path}.{site.layout.query}")).shape[1]


def _same_everywhere(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse what layers may say one by one in a stock config, and no stock latent type can say."""
    layers = current(model)
    seen = sorted({w for w in layers.windows if w is not None})
    if seen:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: layers see {_listed(seen)} tokens back, and no stock latent type has windows; "
            "load the model with sliding_window=None, which changes it beyond that length, or keep its heads"
        )
    if len(set(layers.bases)) > 1 or None in layers.bases or layers.temperature is not None:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: layers rotate differently, or by a temperature that grows with the position; in "
            "a stock latent type one rotary table serves all layers"
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _window(model: PreTrainedModel, anatomy: Anatomy) -> Window:
    """Return what the one rotary module does, if it does so at every length."""
    if len(anatomy.rotary) != 1:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: has {len(anatomy.rotary)} rotary modules; a stock latent type has one"
        )
    found, rope = anatomy.rotary[0], model.config.rope_parameters
    switches = "dynamic" in found.rope_type or rope.get("short_factor") != rope.get("long_factor")
    if not isinstance(found.rope_type, str) or switches:
        raise UnsupportedArchitecture(
            f"{found.path}: its frequencies ({found.rope_type}) change with the length of the text, or by the type "
            "of a layer; a latent is compressed for one table. Load the model with a rope_type of default, linear, "
            "llama3 or yarn, all of which can be said"
        )
    now = window_of(model.get_submodule(found.path), declared_window(model.config))
    return replace(now, frequencies=now.frequencies.cpu())


def _check_frames(site: Site, found: Symmetries) -> None:
    if found.normed:
        raise UnsupportedArchitecture(
            f"{site.path}: {site.kind} divides every key by its own size after the projection (q/k norms), which is "
            f"not linear in the hidden states: no latent holds such keys, as its norm is one for all heads. {_GROUPED}"
        )
    if len(found.keys.fixed) or len(found.values.fixed):
        raise UnsupportedArchitecture(
            f"{site.path}: what {site.kind} does to its keys and values is not known ({found.how}). {_GROUPED}"
        )
    if len(found.keys.block):
        raise UnsupportedArchitecture(
            f"{site.path}: only {2 * len(found.keys.planes)} of the {site.head_dim} dimensions of a head are rotated; "
            f"a head of which all are (partial_rotary_factor 1) can become a latent. {_GROUPED}"
        )
