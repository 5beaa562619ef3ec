"""Patches that build on others: position remapping on positions, a segment memory on everything around attention.

A patch that goes beneath them removes them, is applied, and puts them back, as if it had been applied first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from . import record
from .attention.wrapper import AddWrapper, RemoveWrapper, wrappers_of
from .edits import AddPreHook, Edit, RemoveHook, hooks_of
from .errors import AttnPatchError, PatchConflict
from .patch import REGISTRY, Patch
from .recurrence.modules import recalling_of

_OWNER = "attnpatch_patch"  # attribute of wrappers and hooks: the name of their patch


@dataclass(frozen=True)
class Lifted:
    """Patches that are removed from a model so that another can go beneath them.

    Attributes:
        edits: that remove them.
        patches: in the order in which they are put back.
    """

    edits: tuple[Edit, ...] = ()
    patches: tuple[Patch, ...] = ()


def own(name: str, edits: Iterable[Edit]) -> None:
    """Mark the hooks and wrappers of a patch's edits with its name, so that they are found on any copy of a model."""
    for edit in edits:
        if isinstance(edit, AddPreHook):
            vars(edit.hook)[_OWNER] = name
        elif isinstance(edit, AddWrapper):
            vars(edit.wrapper)[_OWNER] = name


def in_order(patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """Return patches sorted so that each follows those that it builds on."""
    return tuple(sorted(patches, key=lambda patch: patch.height))


def lift(model: PreTrainedModel, patch: Patch) -> Lifted:
    """Return what must be removed from a model before a patch can go beneath it; usually nothing.

    Raises:
        PatchConflict: it could not be put back: its record is lost, or a stream is open.
    """
    least = 1 if patch.changes_positions else 2 if patch.wraps else None
    if least is None:
        return Lifted()
    held = {owner for _, owner in _owned(model) if owner != patch.name and _height(owner) >= least}
    if not held:
        return Lifted()
    found = record.read(model.config)
    kept = {one.name: one for one in (found.restore() if found is not None else ())}
    lost = sorted(held - kept.keys())
    if lost:
        raise PatchConflict(
            f"{type(model).__name__}: {lost[0]} is on this model and stands in no record, so that it could not be put "
            f"on again above {patch.name}; revert it, apply {patch.name}, and then {lost[0]} again."
        )
    _check_no_stream(model, patch)
    again = in_order(one for name, one in kept.items() if name in held)
    return Lifted(tuple(edit for edit, owner in _owned(model) if owner in held), again)


def _owned(model: PreTrainedModel) -> Iterator[tuple[Edit, str]]:
    """Yield the removing edit, and the patch's name, for each of this package's wrappers and hooks."""
    for path, module in model.named_modules():
        for wrapper in wrappers_of(module):
            yield RemoveWrapper(path, wrapper.name), vars(wrapper).get(_OWNER, "")
        for hook in hooks_of(module):
            if _OWNER in getattr(hook, "__dict__", {}):
                yield RemoveHook(path, hook), vars(hook)[_OWNER]


def _height(name: str) -> int:
    return REGISTRY[name].height if name in REGISTRY else 0


def _check_no_stream(model: PreTrainedModel, patch: Patch) -> None:
    if any(hook.is_open for module in model.modules() if (hook := recalling_of(module)) is not None):
        raise AttnPatchError(
            f"{type(model).__name__}: a stream is open, whose memory holds keys of the positions before {patch.name}; "
            "leave its with block first."
        )
