"""Grouped-query and multi-query attention (Ainslie et al., 2305.13245; Shazeer, 1911.02150)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..anatomy import Anatomy, Site
from ..edits import AddPreHook, Edit, ReplaceModule, SetAttribute, SetConfig
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.grouping import METHODS, resize_heads
from ..layouts import blocks, is_transposed, weight_rows
from ..patch import Patch, Proposal
from ..runtime import GroupedProjection, NarrowCache
from ..twin import Difference, difference

# How configs spell the number of key-value heads: (dotted path of the sub-config, field, value from the number).
KV_FIELDS: tuple[tuple[str, str, Callable[[int], Any]], ...] = (
    ("", "num_key_value_heads", int),
    ("", "num_kv_heads", int),
    ("", "multi_query_group_num", int),
    ("attn_config", "kv_n_heads", int),
    ("", "multi_query", lambda n: n == 1),
)


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
        sites = _self_attention(anatomy)
        for site in sites:
            self._check_count(site)
        todo = [s for s in sites if s.num_kv_heads != self.num_kv_heads]
        if not todo:
            return Proposal((), (), (f"already {self.num_kv_heads} key-value heads everywhere; nothing to do",))
        up = todo[0].num_kv_heads < self.num_kv_heads
        native = self._native(model, todo)
        if isinstance(native, str):
            edits, stock = list(self._foreign(model, todo, native)), False
            notes: tuple[str, ...] = (f"not a stock checkpoint: {native}",)
        else:
            edits, stock, notes = native, True, ()
        if len(todo) < len(anatomy.sites):
            notes = (
                *notes,
                f"{len(anatomy.sites) - len(todo)} attention modules left alone (cross-attention or encoder)",
            )
        return Proposal(tuple(edits), tuple(s.path for s in todo), notes, stock=stock, preserves=up)

    def _check_count(self, site: Site) -> None:
        n, kv = self.num_kv_heads, site.num_kv_heads
        fits = [m for m in range(1, site.num_heads + 1) if site.num_heads % m == 0 and (kv % m == 0 or m % kv == 0)]
        if n not in fits:
            raise AttnPatchError(
                f"{site.path}: {kv} key-value heads under {site.num_heads} query heads do not become {n}; "
                f"choose num_kv_heads from {', '.join(map(str, fits))}."
            )

    # -- families whose config has a field ---------------------------------------------------------------------------

    def _native(self, model: PreTrainedModel, sites: list[Site]) -> list[Edit] | str:
        """Return the edits that make a stock model of it, or why there are none."""
        reasons = ["its config has no field for the number of key-value heads"]
        for path, field, value in kv_fields(model.config):
            found = difference(model, _setter(path, field, value(self.num_kv_heads)))
            why = found if isinstance(found, str) else self._unexpected(found, sites)
            if isinstance(found, Difference) and why is None:
                return [SetConfig(path, field, value(self.num_kv_heads)), *self._native_edits(found, sites)]
            reasons.append(f"config.{field} does not give it: {why}")
        return reasons[-1]

    def _unexpected(self, found: Difference, sites: list[Site]) -> str | None:
        """Say what the twin changes beyond key and value projections, or that it does not change those."""
        for site in sites:
            for child in {site.layout.key, site.layout.value}:
                path = f"{site.path}.{child}"
                if path not in found.modules:
                    return f"{path} stays as it is"
                wanted = site.rows(self.num_kv_heads)
                rows = sum(r.numel() for r in (wanted if site.layout.fused else wanted[1:2]))
                if weight_rows(found.twin.get_submodule(path)).shape[0] != rows:
                    return f"{path} gets another shape than {rows} rows"
        for path in found.modules:
            owner = next((s for s in sites if path.startswith(s.path + ".")), None)
            if owner is None:
                return f"{path or 'the model'} changes too"
            if self._resized(owner, path, found.before.get_submodule(path), found.twin.get_submodule(path)) is None:
                return f"{path} changes in a way that heads do not explain"
        return None

    def _native_edits(self, found: Difference, sites: list[Site]) -> Iterator[Edit]:
        for (path, name), value in found.attributes.items():
            yield SetAttribute(path, name, value)
        for path in found.modules:
            site = next(s for s in sites if path.startswith(s.path + "."))
            twin = found.twin.get_submodule(path)
            yield ReplaceModule(path, _Fill(self, site, path, twin), " ".join(str(twin).split()))

    def _resized(self, site: Site, path: str, old: nn.Module, twin: nn.Module) -> dict[str, Tensor] | None:
        """Return the twin's parameters made from the old ones, or None where heads do not explain the shapes."""
        child = path.removeprefix(site.path + ".")
        if child in (site.layout.query, site.layout.key, site.layout.value):
            return self._projection(site, child, old)
        return self._per_head(site, old, twin)

    def _projection(self, site: Site, child: str, old: nn.Module) -> dict[str, Tensor]:
        """Return weight (stored as the family stores it) and bias with the new number of heads."""
        before, after = site.rows(), site.rows(self.num_kv_heads)
        weight = weight_rows(old)
        new = {"weight": self._rows(site, child, weight, before, after)}
        if isinstance(getattr(old, "bias", None), Tensor):
            new["bias"] = self._rows(site, child, old.get_parameter("bias"), before, after)
        if is_transposed(old):
            new["weight"] = new["weight"].t().contiguous()
        return new

    def _rows(
        self, site: Site, child: str, rows: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the rows of one projection with its key and value heads merged."""
        layout = site.layout
        if not layout.fused:
            which = 1 if child == layout.key else 2
            return resize_heads(rows[before[which].to(rows.device)], self.num_kv_heads, self.method).flatten(0, 1)
        new = rows.new_empty(sum(a.numel() for a in after), *rows.shape[1:])
        for which, (old_index, new_index) in enumerate(zip(before, after, strict=True)):
            heads = rows[old_index.to(rows.device)]
            merged = heads if which == 0 else resize_heads(heads, self.num_kv_heads, self.method)
            new[new_index.to(rows.device)] = merged
        return new

    def _per_head(self, site: Site, old: nn.Module, twin: nn.Module) -> dict[str, Tensor] | None:
        """Return per-key-head parameters (a norm over all key heads, one norm per head) merged like the heads."""
        wanted = {name: p.shape for name, p in twin.named_parameters()}
        stacks = _stacks(old, site.num_kv_heads)
        new: dict[str, Tensor] = {}
        for name, stack in stacks.items():
            merged = resize_heads(stack, self.num_kv_heads, self.method)
            for key, tensor in _unstack(name, merged):
                new[key] = (
                    tensor.reshape(wanted[key]) if key in wanted and tensor.numel() == wanted[key].numel() else tensor
                )
        return new if {k: v.shape for k, v in new.items()} == wanted else None

    # -- families whose config has none ------------------------------------------------------------------------------

    def _foreign(self, model: PreTrainedModel, sites: list[Site], why: str) -> Iterator[Edit]:
        """Shared projections that repeat their output, and a cache that stores what is shared."""
        for site in sites:
            if site.num_kv_heads != site.num_heads:
                raise UnsupportedArchitecture(
                    f"{site.path}: {site.kind} already shares {site.num_kv_heads} key-value heads, and {why}; "
                    "only multi-head attention can be regrouped without such a field."
                )
            for child in dict.fromkeys((site.layout.key, site.layout.value)):
                shared = f"GroupedProjection({self.num_kv_heads} shared heads)"
                yield ReplaceModule(f"{site.path}.{child}", _Share(self, site, child), shared)
            groups = site.num_heads // self.num_kv_heads
            yield AddPreHook(site.path, NarrowCache(groups), f"cache holds 1 of {groups} heads")


@dataclass(frozen=True)
class _Fill:
    """Makes a stock module with the new shapes from the old module's weights."""

    patch: GroupedQuery
    site: Site
    path: str
    twin: nn.Module

    def __call__(self, old: nn.Module) -> nn.Module:
        new = copy.deepcopy(self.twin)
        tensors = self.patch._resized(self.site, self.path, old, new)
        assert tensors is not None
        like = next(old.parameters())
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensor.detach(), requires_grad=like.requires_grad)
            new.get_submodule(owner)._parameters[leaf] = parameter
        return new


@dataclass(frozen=True)
class _Share:
    """Makes a :class:`GroupedProjection` from a multi-head projection."""

    patch: GroupedQuery
    site: Site
    child: str

    def __call__(self, old: nn.Module) -> nn.Module:
        site, kv = self.site, self.patch.num_kv_heads
        narrow = replace(
            site, layout=replace(site.layout, packing=blocks if site.layout.fused else site.layout.packing)
        )
        before, after = site.rows(), narrow.rows(kv)
        like = weight_rows(old)
        parameters = [
            nn.Parameter(
                self.patch._rows(site, self.child, t.detach(), before, after), requires_grad=like.requires_grad
            )
            if isinstance(t, Tensor)
            else None
            for t in (like, getattr(old, "bias", None))
        ]
        assert parameters[0] is not None
        dim = site.v_head_dim if self.child == site.layout.value else site.head_dim
        return GroupedProjection(parameters[0], parameters[1], self._index(before, after)[::dim] // dim, dim)

    def _index(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> Tensor:
        """Return the narrow row behind each row that the forward expects."""
        layout, groups = self.site.layout, self.site.num_heads // self.patch.num_kv_heads
        sources = (after[0], *(a.repeat_interleave(groups, dim=0) for a in after[1:]))
        which = range(3) if layout.fused else (1 if self.child == layout.key else 2,)
        index = torch.empty(sum(before[w].numel() for w in which), dtype=torch.int64, device="cpu")
        for w in which:
            index[before[w].flatten()] = sources[w].flatten()
        return index


def kv_fields(config: PretrainedConfig) -> Iterator[tuple[str, str, Callable[[int], Any]]]:
    """Yield the places where this config keeps the number of key-value heads."""
    text = config.get_text_config(decoder=True)
    prefix = next((name for name, value in vars(config).items() if value is text), "")
    for path, field, value in KV_FIELDS:
        owner = getattr(text, path, None) if path else text
        if owner is not None and field in (*vars(owner), *getattr(owner, "attribute_map", {})):
            yield ".".join(filter(None, (prefix, path))), field, value


def _setter(path: str, field: str, value: Any) -> Callable[[PretrainedConfig], None]:
    def change(config: PretrainedConfig) -> None:
        owner = config
        for name in filter(None, path.split(".")):
            owner = getattr(owner, name)
        setattr(owner, field, value)

    return change


def _self_attention(anatomy: Anatomy) -> list[Site]:
    sites = [s for s in anatomy.sites if not s.cross]
    if not sites:
        why = "; ".join(f"{p}: {w}" for p, w in list(anatomy.unread.items())[:3]) or "no module has key and value heads"
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: grouped heads need self-attention with keys and values: {why}."
        )
    return sites


def _stacks(module: nn.Module, num_heads: int) -> dict[str, Tensor]:
    """Return per-head parameters as (num_heads, ...): one tensor over all heads, or one module per head stacked."""
    parameters = dict(module.named_parameters())
    listed = {name.partition(".")[2] for name in parameters if name.split(".")[0].isdigit()}
    if listed:
        return {f"*.{n}": torch.stack([parameters[f"{h}.{n}"].detach() for h in range(num_heads)]) for n in listed}
    return {name: p.detach().reshape(num_heads, -1) for name, p in parameters.items() if p.numel() % num_heads == 0}


def _unstack(name: str, merged: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.startswith("*."):
        yield from ((f"{h}.{name[2:]}", row) for h, row in enumerate(merged))
    else:
        yield name, merged.flatten()
