"""Grouped-query and multi-query attention (Ainslie et al., 2305.13245; Shazeer, 1911.02150)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import heads
from ..anatomy import Anatomy, Site
from ..configs import config_at
from ..edits import AddPreHook, Edit, ReplaceModule, SetAttribute
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.grouping import METHODS, resize_heads
from ..layouts import weight_rows
from ..patch import Patch, Proposal
from ..runtime import GroupedProjection, NarrowCache
from ..twin import Change, Difference, converted, difference

# How configs spell the number of key-value heads: (sub-config below the attention's own, field, value from the number).
KV_FIELDS: tuple[tuple[str, str, Callable[[int], Any]], ...] = (
    ("", "num_key_value_heads", int),
    ("", "num_kv_heads", int),
    ("", "multi_query_group_num", int),
    ("attn_config", "kv_n_heads", int),
    ("", "multi_query", lambda n: n == 1),
)
# fields that some families keep beside the first for layers of another kind
BESIDE = ("num_global_key_value_heads", "swa_num_key_value_heads")


@dataclass(frozen=True, kw_only=True)
class GroupedQuery(Patch):
    """Share key-value heads between query heads, so that the cache holds ``num_kv_heads`` of them.

    Adjacent key and value heads are merged (or, going up, replicated, which leaves the logits what they were). Where
    the family's config has a field for the count, the result is a stock model and a stock checkpoint. Elsewhere (GPT-2,
    GPT-NeoX, OPT, GPT-J, BLOOM, MPT, BERT ...) the projections are replaced by shared ones and the cache is narrowed;
    such a checkpoint loads once this package is imported.

    Args:
        num_kv_heads: key-value heads afterwards; divides the query heads, and divides or is a multiple of the present
            number.
        method: how heads are merged: ``first``, ``mean`` (the paper, section 2.1) or ``mean_rescaled`` (row norms
            restored).

    Raises:
        UnsupportedArchitecture: no attention module with keys and values of its own (state-space, latent attention).
        AttnPatchError: a count that does not divide, an unknown method.
    """

    name: ClassVar[str] = "grouped_query"

    num_kv_heads: int
    method: str = "mean"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AttnPatchError(f"method {self.method!r} does not exist; choose from: {', '.join(METHODS)}.")
        if not isinstance(self.num_kv_heads, int) or isinstance(self.num_kv_heads, bool) or self.num_kv_heads < 1:
            raise AttnPatchError(f"num_kv_heads is {self.num_kv_heads!r}; it must be a whole number, at least 1.")

    def structure(self) -> GroupedQuery:
        """Return the same shapes from the cheapest method."""
        return replace(self, method="first")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which projections would shrink; see :meth:`Patch.propose`."""
        sites = _self_attention(model, anatomy)
        for site in sites:
            self._check_count(site)
        todo = [s for s in sites if s.num_kv_heads != self.num_kv_heads]
        if not todo:
            return Proposal((), (), (f"already {self.num_kv_heads} key-value heads everywhere; nothing to do",))
        native = self._native(model, todo)
        stock = not isinstance(native, str)
        edits = list(self._foreign(model, anatomy, todo, native)) if isinstance(native, str) else native
        notes = [f"not a stock checkpoint: {native}"] if isinstance(native, str) else []
        left = [s for s in anatomy.sites if s not in sites]
        if left:
            notes.append(f"left alone: {len(left)} cross-attention or tower modules, such as {left[0].path}")
        notes += [f"left alone: {why}" for why in dict.fromkeys(anatomy.other.values())]
        up = todo[0].num_kv_heads < self.num_kv_heads
        return Proposal(tuple(edits), tuple(s.path for s in todo), tuple(notes), stock=stock, preserves=up)

    def resize(self, rows: Tensor) -> Tensor:
        """Merge or replicate heads: (num_kv_heads, head_dim, ...) before and after."""
        return resize_heads(rows, self.num_kv_heads, self.method)

    def _check_count(self, site: Site) -> None:
        n, kv = self.num_kv_heads, site.num_kv_heads
        fits = [m for m in range(1, site.num_heads + 1) if site.num_heads % m == 0 and (kv % m == 0 or m % kv == 0)]
        if n not in fits:
            raise AttnPatchError(
                f"{site.path}: {kv} key-value heads under {site.num_heads} query heads do not become {n}; "
                f"choose num_kv_heads from {', '.join(map(str, fits))}."
            )

    def _native(self, model: PreTrainedModel, sites: list[Site]) -> list[Edit] | str:
        """Return the edits that make a stock model of it, or why there are none."""
        reason = "its config has no field for the number of key-value heads"
        for changes in self._changes(model, sites):
            found = difference(model, changes)
            why = found if isinstance(found, str) else self._unexpected(found, sites)
            if isinstance(found, Difference) and why is None:
                return [*(c.edit() for c in changes), *self._native_edits(found, sites)]
            reason = f"config.{changes[0].field} does not give it: {why}"
        return reason

    def _changes(self, model: PreTrainedModel, sites: list[Site]) -> Iterator[list[Change]]:
        """Yield the ways to say the number in the configs that built the sites."""
        for below, field, value in KV_FIELDS:
            paths = [".".join(filter(None, (p, below))) for p in dict.fromkeys(s.config for s in sites)]
            if not all(_has_field(model, path, field) for path in paths):
                continue
            changes = [Change(path, field, value(self.num_kv_heads)) for path in paths]
            yield changes
            beside = [(path, name) for path in paths for name in BESIDE if _has_field(model, path, name)]
            if beside:
                yield [*changes, *(Change(path, name, self.num_kv_heads) for path, name in beside)]

    def _unexpected(self, found: Difference, sites: list[Site]) -> str | None:
        """Say what the twin changes beyond key and value projections, or that it does not change those."""
        for site in sites:
            for child in {site.layout.key, site.layout.value}:
                path = f"{site.path}.{child}"
                if path not in found.modules:
                    return f"{path} stays as it is"
                rows = heads.num_rows(site, child, self.num_kv_heads)
                if weight_rows(found.twin.get_submodule(path)).shape[0] != rows:
                    return f"{path} gets another shape than {rows} rows"
        for path in found.modules:
            owner = next((s for s in sites if path.startswith(s.path + ".")), None)
            if owner is None:
                return f"{path or 'the model'} changes too"
            before, twin = found.before.get_submodule(path), found.twin.get_submodule(path)
            if _Fill(self, owner, path, twin).tensors(before) is None:
                return f"{path} changes in a way that heads do not explain"
        return None

    def _native_edits(self, found: Difference, sites: list[Site]) -> Iterator[Edit]:
        for (path, name), value in found.attributes.items():
            yield SetAttribute(path, name, value)
        for path in found.modules:
            site = next(s for s in sites if path.startswith(s.path + "."))
            twin = found.twin.get_submodule(path)
            yield ReplaceModule(path, _Fill(self, site, path, twin), " ".join(str(twin).split()))

    def _foreign(self, model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], why: str) -> Iterator[Edit]:
        """Shared projections that repeat their output, and a cache that stores what is shared."""
        for site in sites:
            if site.num_kv_heads != site.num_heads:
                raise UnsupportedArchitecture(
                    f"{site.path}: {site.kind} already shares {site.num_kv_heads} key-value heads, and {why}; "
                    "only multi-head attention can be regrouped without such a field."
                )
            for child in dict.fromkeys((site.layout.key, site.layout.value)):
                if converted(model, f"{site.path}.{child}.weight"):
                    raise UnsupportedArchitecture(
                        f"{site.path}.{child}: {anatomy.architecture} checkpoints hold it fused with others in equal "
                        f"parts, which shared heads are not; and {why}."
                    )
                shared = f"GroupedProjection({self.num_kv_heads} shared heads)"
                yield ReplaceModule(f"{site.path}.{child}", _Share(self, site, child), shared)
            groups = site.num_heads // self.num_kv_heads
            yield AddPreHook(site.path, NarrowCache(groups, not site.dispatches), f"cache holds 1 of {groups} heads")


@dataclass(frozen=True)
class _Fill:
    """Makes a stock module with the new shapes from the old module's weights."""

    patch: GroupedQuery
    site: Site
    path: str
    twin: nn.Module

    def tensors(self, old: nn.Module) -> dict[str, Tensor] | None:
        """Return the twin's parameters made from the old ones, or None where heads do not explain the shapes."""
        child, layout = self.path.removeprefix(self.site.path + "."), self.site.layout
        if child in (layout.key, layout.value):
            return heads.projection(self.site, child, old, self.patch.num_kv_heads, self.patch.resize)
        return heads.per_head(self.site, old, self.twin, self.patch.resize)

    def __call__(self, old: nn.Module) -> nn.Module:
        new, tensors = copy.deepcopy(self.twin), self.tensors(old)
        assert tensors is not None
        trains = {name: p.requires_grad for name, p in old.named_parameters()}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.detach(), requires_grad=trains.get(name, True))
            new.get_submodule(owner)._parameters[leaf] = parameter
        return new


@dataclass(frozen=True)
class _Share:
    """Makes a :class:`GroupedProjection` from a multi-head projection."""

    patch: GroupedQuery
    site: Site
    child: str

    def __call__(self, old: nn.Module) -> nn.Module:
        trains = {name: p.requires_grad for name, p in old.named_parameters()}
        tensors, index = heads.shared(self.site, self.child, old, self.patch.num_kv_heads, self.patch.resize)
        parameters = {
            name: nn.Parameter(tensor, requires_grad=trains.get(name, True)) for name, tensor in tensors.items()
        }
        dim = heads.block(self.site, self.child)
        return GroupedProjection(parameters["weight"], parameters.get("bias"), index, dim)


def _has_field(model: PreTrainedModel, path: str, field: str) -> bool:
    try:
        config = config_at(model, path)
    except AttributeError:
        return False
    return field in (*vars(config), *getattr(config, "attribute_map", {}))


def _self_attention(model: PreTrainedModel, anatomy: Anatomy) -> list[Site]:
    """Return the sites to regroup, or refuse the model."""
    sites = [s for s in anatomy.sites if not s.cross and not s.tower]
    if anatomy.unread or not sites:
        path, why = next(iter((anatomy.unread or anatomy.other).items()), ("", "no module has key and value heads"))
        place = f"{path}: " if path else ""
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: grouped heads need self-attention with readable keys and values; {place}{why}."
        )
    owners: dict[int, Site] = {}
    for site in sites:
        weight = model.get_submodule(f"{site.path}.{site.layout.key}").weight
        first = owners.setdefault(id(weight), site)
        if first is not site:
            raise UnsupportedArchitecture(
                f"{site.path}: shares its weights with {first.path}; regrouping would untie them."
            )
    return sites
