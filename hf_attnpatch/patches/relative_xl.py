"""Replaces a model's positions by Transformer-XL's relative attention."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import guarded, kernel_of, set_kernel
from ..attention.relative import CHILD, Relative, RelativeTerm, RelativeTerms, default_size, relative_of
from ..attention.wrapper import AddWrapper
from ..backends import Candidate
from ..edits import AddModule, Edit, ReplaceModule
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..patch import Patch, Proposal
from ..positions.choice import BACKENDS, choose
from ..positions.counting import counted
from ..positions.fusing import deferred
from ..positions.removal import RELATIVE, check_blind, check_followed, removal, removed
from ..positions.sinks import passes_sinks
from ..probe import check_loaded
from ..rope.fields import check_number
from ..sites import Site, dispatching
from ..upstream.partitioned import is_partitioned

Edits = tuple[Edit, ...]
Maker = Callable[[Site, torch.Tensor], RelativeTerms]
INITS = ("recency", "zero")
REACH = 4096  # tokens over which recency is fitted at most


@dataclass(frozen=True, kw_only=True)
class RelativeXl(Patch):
    """Relative positions of Transformer-XL (1901.02860, 3.3): scores are (q + u) k + (q + v) W R(i - j).

    R is the sinusoid of the distance; u, v and W are new trainable parameters, for each query head of each layer. The
    model's old positions are removed. A fused kernel computes the position term as extra dimensions of queries and
    keys, in linear memory, where the paper shifts a matrix of scores; backend ``eager`` is dense. There is no longest
    distance. A model that was not trained with these terms has to be (under LoRA, with
    ``modules_to_save=["relative_xl"]``). Stock transformers cannot express the result, so checkpoints have this
    package's model type. Together with :class:`SegmentRecurrence` this is Transformer-XL.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        size: dimensions of R, even; the kernel's heads grow by as much (FlashAttention takes 256 in all). None takes
            the
            size of a head. The paper uses the width of the model.
        theta: base of R's wavelengths.
        init: ``recency`` starts with ALiBi's preference for near tokens, encoded in v W by least squares within the
            trained length; ``zero`` starts as a model without positions. Both leave u at zero.
        backend: ``auto`` (the fastest that runs here and matches the reference on a probe), ``sdpa``,
            ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4``, or ``eager``, the dense reference.
        training: whether a backward pass is needed; None reads ``model.training``.

    Raises:
        UnsupportedArchitecture: old positions cannot be removed, an attention module is unknown, or no backend runs.
        AttnPatchError: an argument out of range.
    """

    name: ClassVar[str] = "relative_xl"
    changes_positions: ClassVar[bool] = True
    wraps: ClassVar[bool] = True
    experimental: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"training"})

    size: int | None = None
    theta: float = 10000.0
    init: Literal["recency", "zero"] = "recency"
    backend: Literal[
        "auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"
    ] = "auto"
    training: bool | None = None
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("theta", self.theta, at_least=1)
        size = self.size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 2 or size % 2):
            raise AttnPatchError(f"size is {size!r}; it must be an even number of dimensions, at least 2, or None.")
        if self.init not in INITS:
            raise AttnPatchError(f"init {self.init!r} does not exist; choose from: {', '.join(INITS)}.")
        if self.backend not in ("auto", *BACKENDS):
            raise AttnPatchError(f"backend {self.backend!r} does not exist; choose from auto, {', '.join(BACKENDS)}.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that replace the positions, and the kernel; see :meth:`Patch.propose`."""
        if anatomy.relative:
            raise UnsupportedArchitecture(
                f"{anatomy.relative[0]}: has Transformer-XL's terms already; revert them first."
            )
        sites = _sites(anatomy)
        for site in sites:
            check_loaded(model, f"{site.path}.{site.layout.query}")
        away = removal(model, anatomy, own=RELATIVE)
        ears: dict[str, _Ear] = {}
        loud = (*away, *_put(model, sites, self._loud(ears)))  # with zeros, every kernel would pass
        native = not any(site.dispatches for site in sites)
        rest, said = (self._of_a_native if native else self._dispatched)(model, anatomy, sites, loud)
        terms = _put(model, sites, self._quiet(min(anatomy.max_positions or 1024, REACH), ears))
        count = sum(s.num_heads * s.head_dim * (2 + self._size(s)) for s in sites)
        what = f"u, v and W for each head, R of {self._size(sites[0])} ({self.init}): {count:,} new parameters"
        paths = tuple(site.path for site in sites)
        notes = (*removed(anatomy), what, said)
        edits = (*away, *terms, *counted(model, paths, relative_of), *rest)
        return Proposal(edits, paths, notes, stock=False, claims=("the positions",))

    def _dispatched(
        self, model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], loud: Edits
    ) -> tuple[Edits, str]:
        places = dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
        strange = next((place.path for place in places if place.path not in {site.path for site in sites}), None)
        if strange is not None:
            why = anatomy.other[strange]
            raise UnsupportedArchitecture(
                f"{strange}: {why}; the terms need heads of queries and keys to stand beside."
            )
        guards = guarded(model, anatomy.base, [(site.path, site.config) for site in sites])
        if self.proved:
            asked = kernel_of(model.config._attn_implementation)
            name = self.backend if self.backend != "auto" else asked if asked in BACKENDS else "sdpa"
            return (*guards, set_kernel(name)), name
        training = model.training if self.training is None else self.training
        wide = max(s.head_dim + self._size(s) for s in sites)
        request = Candidate(model, model.dtype, wide, training, passes_sinks(model, anatomy.dispatching))
        name, said = choose(anatomy, request, self.backend, loud, "Transformer-XL's terms")
        return (*guards, set_kernel(name)), said

    def _of_a_native(
        self, model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], loud: Edits
    ) -> tuple[Edits, str]:
        """Handle BLOOM, MPT, GPT-J and CodeGen, whose own forwards stay."""
        if self.backend not in ("auto", "sdpa"):
            raise AttnPatchError(f"{anatomy.architecture}: its own forward stays, which takes backend='sdpa' only.")
        more: Edits | str = ()
        if not anatomy.alibi or anatomy.biased:  # where not, taking its bias out has made it so already
            more = deferred(model, anatomy)
        if isinstance(more, str):
            raise UnsupportedArchitecture(f"{anatomy.architecture}: its forward cannot be followed: {more}.")
        if not self.proved:
            check_followed(model, anatomy, (*loud, *more))
            check_blind(model, anatomy, (*loud, *more))
        return more, "through torch's kernel inside the forwards that stay"

    def _loud(self, ears: dict[str, _Ear]) -> Maker:
        def make(site: Site, like: torch.Tensor) -> RelativeTerms:
            ears[site.path] = _Ear(site.num_heads, site.head_dim, self._size(site), float(self.theta), like)
            return ears[site.path]

        return make

    def _quiet(self, reach: int, ears: Mapping[str, _Ear]) -> Maker:
        def make(site: Site, like: torch.Tensor) -> RelativeTerms:
            terms = RelativeTerms(site.num_heads, site.head_dim, self._size(site), float(self.theta), like)
            loading = like.is_meta or torch.empty(0).is_meta or is_partitioned(terms.weight)
            if self.init == "recency" and not loading:
                heard = ears[site.path].heard.get("scale") if site.path in ears else None
                terms.look_back(site.head_dim**-0.5 if heard is None else heard, reach)
            return terms

        return make

    def _size(self, site: Site) -> int:
        return self.size or default_size(site.head_dim)


class _Ear(RelativeTerms):
    """Terms with large random values, which record the scale of the scores."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.heard: UserDict[str, float] = UserDict()  # not a plain dict: a probe restores those that modules hold
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def of(self, query: torch.Tensor, scale: float, module: nn.Module | None = None) -> RelativeTerm:
        """Listen."""
        self.heard["scale"] = scale
        return super().of(query, scale, module)


def _put(model: PreTrainedModel, sites: list[Site], make: Maker) -> Edits:
    """Return the edits that give every attention module the terms as a child."""
    found: list[Edit] = []
    for site in sites:
        module = model.get_submodule(site.path)
        like: torch.Tensor = next(module.parameters())
        made = functools.partial(_made, make, site, like if like.is_floating_point() else like.float())
        after = f"u, v, W for {site.num_heads} heads"
        if CHILD in module._modules:  # of an earlier patch, taken out by a later one
            found.append(ReplaceModule(f"{site.path}.{CHILD}", made, after))
        else:
            found.append(AddModule(site.path, CHILD, made, after))
        found.append(AddWrapper(site.path, Relative()))
    return tuple(found)


def _made(make: Maker, site: Site, like: torch.Tensor, _: nn.Module) -> nn.Module:
    return make(site, like)


def _sites(anatomy: Anatomy) -> list[Site]:
    sites = [site for site in anatomy.sites if not site.cross and not site.tower]
    if anatomy.unread or not sites:
        nothing = (anatomy.architecture, "no self-attention module was read")
        path, why = next(iter({**anatomy.unread, **anatomy.other}.items()), nothing)
        raise UnsupportedArchitecture(f"{path}: {why}; the terms need heads of queries and keys to stand beside.")
    return sites
