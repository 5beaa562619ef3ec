"""The edits that put other key-value heads into a model: stock modules where the config can say so, else our own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy, Site
from ..aside import laid
from ..configs import config_at
from ..edits import AddPreHook, Edit, ReplaceModule, SetAttribute, SetConfig
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.finite import all_finite
from ..functional.grouping import resize_heads
from ..layouts import is_transposed, weight_rows
from ..modules.heads import GroupedProjection, NarrowCache
from ..twin import Change, Difference, converted, difference
from . import projections as heads
from .outcome import Conversion
from .weights import HeadWeights

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


@dataclass
class Source:
    """The source of the new weights: merged head by head while writing, or from a conversion.

    Attributes:
        num_kv_heads: new number of heads.
        method: for heads outside the conversion.
        conversion: set by `apply` before the first edit, if the method needs one.
    """

    num_kv_heads: int
    method: str
    conversion: Conversion | None = field(default=None, repr=False)
    released: bool = False

    def release(self) -> None:
        """Free the converted weights, which are in the model by now."""
        self.conversion, self.released = None, True

    def weights(self, site: Site) -> HeadWeights | None:
        """Return a module's conversion, with groups of adjacent heads; None if heads are just resized."""
        assert not self.released, "the converted weights were written, and are not kept"
        found = self.conversion.weights.get(site.path) if self.conversion else None
        return None if found is None else found.adjacent()

    def resize(self, rows: Tensor) -> Tensor:
        """Merge or replicate heads: (num_kv_heads, head_dim, ...) before and after."""
        return resize_heads(rows, self.num_kv_heads, self.method)

    def rows(self, site: Site) -> heads.Resize:
        """Return the function that maps old rows to new rows, for queries, keys and values."""
        found = self.weights(site)
        if found is None:
            return lambda which, rows: self.resize(rows) if which else rows
        parts = (found.query, found.key, found.value)

        def replacement(which: int, rows: Tensor) -> Tensor:
            new = parts[which][..., :-1] if rows.dim() == 3 else parts[which][..., -1]
            return new.to(rows).contiguous()  # a slice would keep the biases beside it alive

        return replacement


def native(model: PreTrainedModel, sites: list[Site], source: Source, rewritten: bool) -> list[Edit] | str:
    """Return the edits that make a stock model, or a sentence why there are none.

    Args:
        model: left unchanged.
        sites: attention modules to regroup.
        source: of the new weights.
        rewritten: whether query and output projections get new weights as well.
    """
    reason = "its config has no field for the number of key-value heads"
    for changes in _changes(model, sites, source.num_kv_heads):
        found = difference(model, changes)
        why = found if isinstance(found, str) else _unexpected(found, sites, source)
        if isinstance(found, Difference) and why is None:
            edits = [*(c.edit() for c in changes), *_native_edits(found, sites, source)]
            return [*edits, *_rewritten(sites, source, "stock")] if rewritten else edits
        reason = f"config.{changes[0].field} does not give it: {why}"
    return reason


def foreign(
    model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], source: Source, why: str, rewritten: bool
) -> Iterator[Edit]:
    """Yield shared projections that repeat their output, and a cache of the shared heads.

    Raises:
        UnsupportedArchitecture: heads are shared already, or the family's checkpoints fuse them in equal parts.
    """
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
            shared = f"GroupedProjection({source.num_kv_heads} shared heads)"
            yield ReplaceModule(f"{site.path}.{child}", _Share(source, site, child), shared)
        groups = site.num_heads // source.num_kv_heads
        narrow = NarrowCache(groups, not site.dispatches)  # first: other hooks hand over caches that it would not know
        yield AddPreHook(site.path, narrow, f"cache holds 1 of {groups} heads", first=True)
    if model.can_generate() and not any(site.cross or site.tower for site in anatomy.sites):
        # no module reads it, but whoever makes a cache before the first token does: static ones, PEFT's learned prefix
        for config in dict.fromkeys(site.config for site in sites):
            if not hasattr(config_at(model, config), KV_FIELDS[0][1]):  # or other modules are built by it (Doge)
                yield SetConfig(config, KV_FIELDS[0][1], source.num_kv_heads)
    if rewritten:
        yield from _rewritten(sites, source, "the same module")


def _rewritten(sites: list[Site], source: Source, what: str) -> Iterator[Edit]:
    """Yield new weights for the query and output projections, in modules of the same shape."""
    for site in sites:
        if not site.layout.fused:
            yield ReplaceModule(
                f"{site.path}.{site.layout.query}", _Queries(source, site), f"{what}, turned to the keys"
            )
        yield ReplaceModule(site.output, _Output(source, site), f"{what}, turned to the values")


def _changes(model: PreTrainedModel, sites: list[Site], num_kv_heads: int) -> Iterator[list[Change]]:
    """Yield the config fields that may give the number, for the configs that built the sites."""
    for below, field_, value in KV_FIELDS:
        paths = [".".join(filter(None, (p, below))) for p in dict.fromkeys(s.config for s in sites)]
        if not all(_has_field(model, path, field_) for path in paths):
            continue
        changes = [Change(path, field_, value(num_kv_heads)) for path in paths]
        yield changes
        beside = [(path, name) for path in paths for name in BESIDE if _has_field(model, path, name)]
        if beside:
            yield [*changes, *(Change(path, name, num_kv_heads) for path, name in beside)]


def _unexpected(found: Difference, sites: list[Site], source: Source) -> str | None:
    """Return what the twin changes beyond key and value projections, or that it does not change them; else None."""
    for site in sites:
        for child in {site.layout.key, site.layout.value}:
            path = f"{site.path}.{child}"
            if path not in found.modules:
                return f"{path} stays as it is"
            rows = heads.num_rows(site, child, source.num_kv_heads)
            if weight_rows(found.twin.get_submodule(path)).shape[0] != rows:
                return f"{path} gets another shape than {rows} rows"
    for path in found.modules:
        owner = next((s for s in sites if path.startswith(s.path + ".")), None)
        if owner is None:
            return f"{path or 'the model'} changes too"
        before, twin = found.before.get_submodule(path), found.twin.get_submodule(path)
        if _Fill(source, owner, path, twin).tensors(before) is None:
            return f"{path} changes in a way that heads do not explain"
    return None


def _native_edits(found: Difference, sites: list[Site], source: Source) -> Iterator[Edit]:
    for (path, name), value in found.attributes.items():
        yield SetAttribute(path, name, value)
    for path in found.modules:
        site = next(s for s in sites if path.startswith(s.path + "."))
        twin = found.twin.get_submodule(path)
        yield ReplaceModule(path, _Fill(source, site, path, twin), " ".join(str(twin).split()))


@dataclass(frozen=True)
class _Fill:
    """Makes a stock module with the new shapes from the old module's weights."""

    source: Source
    site: Site
    path: str
    twin: nn.Module

    def tensors(self, old: nn.Module) -> dict[str, Tensor] | None:
        """Return the twin's parameters made from the old ones, or None if heads do not explain the shapes."""
        child, layout = self.path.removeprefix(self.site.path + "."), self.site.layout
        if child in (layout.key, layout.value):
            n = self.source.num_kv_heads
            return heads.projection(self.site, child, old, n, self.source.rows(self.site))
        return heads.per_head(self.site, old, self.twin, self.source.resize)

    def __call__(self, old: nn.Module) -> nn.Module:
        with align_module_device(old):
            tensors = self.tensors(old)
            assert tensors is not None
            _check_finite(self.path, tensors)
            return _filled(copy.deepcopy(self.twin), tensors, old)


@dataclass(frozen=True)
class _Share:
    """Makes a :class:`GroupedProjection` from a multi-head projection."""

    source: Source
    site: Site
    child: str

    def __call__(self, old: nn.Module) -> nn.Module:
        trains = {name: p.requires_grad for name, p in old.named_parameters()}
        resize = self.source.rows(self.site)
        with align_module_device(old):
            tensors, index = heads.shared(self.site, self.child, old, self.source.num_kv_heads, resize)
            _check_finite(f"{self.site.path}.{self.child}", tensors)
        parameters = {
            name: nn.Parameter(laid(tensor), requires_grad=trains.get(name, True)) for name, tensor in tensors.items()
        }
        dim = heads.block(self.site, self.child)
        return GroupedProjection(parameters["weight"], parameters.get("bias"), index, dim)


@dataclass(frozen=True)
class _Queries:
    """Makes a query projection of the same shape with new weights."""

    source: Source
    site: Site

    def __call__(self, old: nn.Module) -> nn.Module:
        with align_module_device(old):
            child, kv = self.site.layout.query, self.site.num_kv_heads
            tensors = heads.projection(self.site, child, old, kv, self.source.rows(self.site))
            return _filled(_hollow(old), tensors, old)


@dataclass(frozen=True)
class _Output:
    """Makes an output projection of the same shape with new weights."""

    source: Source
    site: Site

    def __call__(self, old: nn.Module) -> nn.Module:
        found = self.source.weights(self.site)
        assert found is not None
        with align_module_device(old):
            kept = dict(old.named_parameters())
            weight = found.output.flatten(1)
            tensors = {"weight": (weight.t() if is_transposed(old) else weight).contiguous().to(kept["weight"])}
            if found.output_bias is not None:
                tensors["bias"] = found.output_bias.to(kept["bias"])
            return _filled(_hollow(old), tensors, old)


def _check_finite(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to make heads from weights with NaN or infinity, which torch's CPU kernels may hide.

    Raises:
        AttnPatchError: the new heads are not finite.
    """
    wrong = next((name for name, t in tensors.items() if not t.is_meta and not all_finite(t)), None)
    if wrong is not None:
        raise AttnPatchError(
            f"{path}.{wrong}: the new heads are not finite: the weights that they are made of hold NaN or infinity, or "
            "overflow; look at the checkpoint."
        )


def _hollow(old: nn.Module) -> nn.Module:
    """Return a copy that shares its parameters with the old module until they are set, without Accelerate's hook."""
    new = copy.copy(old)
    for name, value in list(vars(new).items()):
        if name in ("forward", "_old_forward", "_hf_hook"):  # bound to the old module
            del vars(new)[name]
        elif isinstance(value, dict):
            vars(new)[name] = value.copy()
    return new


def _filled(new: nn.Module, tensors: dict[str, Tensor], old: nn.Module) -> nn.Module:
    """Set parameters, each trainable if its origin was."""
    trains = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(laid(tensor.detach()), requires_grad=trains.get(name, True))
        new.get_submodule(owner)._parameters[leaf] = parameter
    return new


def _has_field(model: PreTrainedModel, path: str, name: str) -> bool:
    try:
        config = config_at(model, path)
    except AttributeError:
        return False
    return name in (*vars(config), *getattr(config, "attribute_map", {}))
