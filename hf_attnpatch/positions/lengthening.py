"""Edits that lengthen a model's own position table, and everything else of that length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..configs import config_path
from ..edits import Edit, ReplaceModule, SetAttribute, SetBuffer
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.tables import lengthened
from ..sites import in_tower
from ..twin import Change, Difference, difference

_FIELD = "max_position_embeddings"


def learned(model: PreTrainedModel, anatomy: Anatomy) -> list[str]:
    """Return the paths of the learned tables; a fixed sinusoid cannot be lengthened."""
    found = [path for path in anatomy.tables if not in_tower(path)]
    modules = {path: model.get_submodule(path) for path in found}
    return [p for p, m in modules.items() if isinstance(getattr(m, "weight", None), nn.Parameter) and not _fixed(m)]


def _fixed(module: nn.Module) -> bool:
    return "Sinusoidal" in type(module).__name__


def reserved(table: nn.Module) -> int:
    """Return how many first rows are not positions: OPT's offset, or RoBERTa's rows up to the padding."""
    padding = getattr(table, "padding_idx", None)
    return int(getattr(table, "offset", 0 if padding is None else padding + 1))


def longer(model: PreTrainedModel, anatomy: Anatomy, tables: list[str], length: int, method: str) -> tuple[Edit, ...]:
    """Return the edits that give tables ``length`` positions, with the config and the buffers of that length.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        tables: paths of the learned tables.
        length: in tokens, above the present number.
        method: see :func:`.functional.tables.lengthened`.

    Raises:
        UnsupportedArchitecture: the config's maximum does not determine the tables, or something else has their length
            by an unknown rule.
    """
    config = model.config.get_text_config(decoder=True)
    path, declared = config_path(model, config) or "", getattr(config, _FIELD, None)
    trained = positions(model, anatomy, tables)
    if not isinstance(declared, int):
        raise UnsupportedArchitecture(
            f"{type(config).__name__}: {_FIELD} is {declared!r}; no field says how long it is."
        )
    change = Change(path, _FIELD, declared + length - trained)
    found = difference(model, [change])
    if isinstance(found, str):
        raise AttnPatchError(f"{anatomy.architecture}: {found}.")
    edits: list[Edit] = [change.edit()]
    edits += [SetAttribute(*key, value) for key, value in found.attributes.items()]
    edits += _resized(model, found, tables, method)
    missed = [table for table in tables if table not in {edit.path for edit in edits}]
    if missed:
        raise UnsupportedArchitecture(
            f"{missed[0]}: config.{_FIELD} does not say how long it is; it cannot be lengthened."
        )
    return tuple(edits)


def positions(model: PreTrainedModel, anatomy: Anatomy, tables: list[str]) -> int:
    """Return how many positions the tables have.

    Raises:
        UnsupportedArchitecture: the tables have different lengths.
    """
    found = {anatomy.tables[path] - reserved(model.get_submodule(path)) for path in tables}
    if len(found) != 1:
        raise UnsupportedArchitecture(
            f"{', '.join(tables)}: the tables have different lengths, {sorted(found)}; no single length fits them all."
        )
    return found.pop()


def _resized(model: PreTrainedModel, found: Difference, tables: list[str], method: str) -> Iterator[Edit]:
    """Yield an edit for every tensor that has another shape in the twin."""
    for outer in found.modules:
        for inner, twin in found.twin.get_submodule(outer).named_modules():
            path, old = ".".join(filter(None, (outer, inner))), dict(found.before.named_modules())
            if path in tables:
                make = _LongerTable(twin, method)
                yield ReplaceModule(path, make, f"{tuple(twin.weight.shape)}, {method}")
                continue
            for name, buffer in twin.named_buffers(recurse=False):
                if buffer.shape != dict(old[path].named_buffers(recurse=False))[name].shape:
                    present = model.get_submodule(path).get_buffer(name)
                    extension = _extension(present, buffer.shape)
                    if extension is None:
                        raise UnsupportedArchitecture(
                            f"{path}.{name}: as long as the table, by a rule that is not known."
                        )
                    yield SetBuffer(path, name, extension, str(tuple(buffer.shape)))
            for name, weight in twin.named_parameters(recurse=False):
                if weight.shape != old[path].get_parameter(name).shape:
                    raise UnsupportedArchitecture(
                        f"{path}.{name}: a weight as long as the table that is no position table."
                    )


class _LongerTable:
    """Builds the longer table as transformers builds it from the longer config."""

    def __init__(self, twin: nn.Module, method: str):
        self.twin, self.method = twin, method

    def __call__(self, old: nn.Module) -> nn.Module:
        weight, first = old.get_parameter("weight"), reserved(old)
        new = copy.deepcopy(self.twin).to_empty(device=weight.device).to(weight.dtype)
        made = new.get_parameter("weight")
        with torch.no_grad():
            made[:first].copy_(weight[:first])
            made[first:].copy_(lengthened(weight[first:], made.shape[0] - first, self.method))
        made.requires_grad_(weight.requires_grad)
        return new


def _extension(old: Tensor, shape: torch.Size) -> Callable[[Tensor], Tensor] | None:
    """Return how to lengthen a buffer: one that counts, is constant, or depends on the distance only; else None."""
    if old.numel() and bool((old == old.flatten()[0]).all()):
        return lambda t: t.flatten()[0].expand(shape).clone()
    if old.numel() == old.shape[-1] and torch.equal(old.flatten(), torch.arange(old.shape[-1]).to(old)):
        return lambda t: torch.arange(shape[-1]).to(t).expand(shape).clone()
    if old.dim() >= 2 and old.shape[-1] == old.shape[-2] and torch.equal(_by_distance(old, old.shape), old):
        return lambda t: _by_distance(t, shape)
    return None


def _by_distance(old: Tensor, shape: torch.Size) -> Tensor:
    """Return a square matrix of this shape with the old one's value at each distance, or at its largest distance."""
    rows, wanted = old.shape[-1], torch.arange(shape[-1], device=old.device)
    gap = (wanted[:, None] - wanted).clamp(1 - rows, rows - 1)
    matrix = old.reshape(-1, rows, rows)[0]
    return matrix[gap.clamp(min=0), (-gap).clamp(min=0)].expand(shape).clone()
