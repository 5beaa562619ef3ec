"""Base class of edits: one write to a model, with a claim on what it touches and a way back.

``prepare`` makes everything that will be written and returns a :class:`Write`, which writes it, knows whether it is
still in place, and undoes it by putting the very same objects back. Callers keep the :class:`Write` before it is done,
so that an interruption at any moment finds the way back.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .errors import AttnPatchError
from .interruption import complete, ensured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ABSENT = object()


@dataclass(frozen=True)
class Write:
    """One prepared edit of one model, which can be done and undone any number of times.

    Attributes:
        claim: what the edit touches.
        stands: returns whether the edit is in place, that is, whether undoing it would change nothing else.
        do: writes.
        undo: undoes it; harmless if it was undone before, never done, or done in part.
        place: identifies what is overwritten; of several writes to one place the last has to stand. None: nothing is.
        settle: called when all writes of a call are done: what they made of this one's result is no outside change.
    """

    claim: str
    stands: Callable[[], bool]
    do: Callable[[], None]
    undo: Callable[[], None]
    place: Hashable = None
    settle: Callable[[], None] | None = None


@dataclass(frozen=True)
class Edit(ABC):
    """One write to a model.

    Attributes:
        path: the module (or the config) it writes to, as in ``named_modules``; empty for the model itself.
        rung: the kind of edit: config, attribute, attention, weights, module, hook, or model.
    """

    rung: ClassVar[str]
    path: str

    @property
    @abstractmethod
    def claim(self) -> str:
        """What the edit touches; two patches with an equal claim are in conflict."""

    @abstractmethod
    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return the old and the new value as short texts."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> Write:
        """Prepare the write, and write nothing."""

    def run(self, model: PreTrainedModel) -> Write:
        """Write all or nothing, and return the way back."""
        write = self.prepare(model)
        try:
            write.do()
        except BaseException:
            complete(write.undo)
            raise
        return write


def swap(store: dict[str, Any], key: str, value: Any, claim: str) -> Write:
    """Return the write of ``value`` under ``key``; it keeps the present object, or its absence, for the way back."""
    old = store.get(key, ABSENT)
    kinds = _kinds(value)

    def do() -> None:
        store[key] = value

    def undo() -> None:
        if old is ABSENT:
            store.pop(key, None)
        else:
            _follow(old, value, kinds)
            store[key] = old

    return Write(claim, lambda: store.get(key, ABSENT) is value, do, undo, (id(store), key))


def write_all(model: PreTrainedModel, edits: Sequence[Edit], writes: list[Write]) -> None:
    """Prepare and do edits in order; each is in ``writes`` before it is done."""
    for edit in edits:
        write = edit.prepare(model)
        writes.append(write)
        write.do()
    for write in writes:
        if write.settle is not None:
            write.settle()


def lost(writes: Sequence[Write]) -> list[str]:
    """Return the claims of writes that were overwritten since."""
    last = {id(write) if write.place is None else write.place: write for write in writes}
    return [write.claim for write in last.values() if not write.stands()]


def undo_all(writes: Sequence[Write]) -> None:
    """Undo writes in reverse order; they stay in the list, so that this can be repeated."""
    for write in reversed(writes):
        write.undo()


@contextlib.contextmanager
def tried(model: PreTrainedModel, edits: Sequence[Edit]) -> Iterator[None]:
    """Edit a model for the duration of a block."""
    writes: list[Write] = []
    with ensured(lambda: undo_all(writes)):
        write_all(model, edits, writes)
        yield


def _kinds(value: Any) -> set[tuple[torch.dtype, torch.device]]:
    """Return the dtypes and devices of a module's floating-point tensors in memory; empty for other values."""
    if not isinstance(value, nn.Module):
        return set()
    tensors = (t for t in (*value.parameters(), *value.buffers()) if t.is_floating_point() and not t.is_meta)
    return {(t.dtype, t.device) for t in tensors}


def _follow(old: Any, new: Any, before: set[tuple[torch.dtype, torch.device]]) -> None:
    """Cast and move a module that is put back in the way that its replacement was since."""
    now = _kinds(new)
    if not isinstance(old, nn.Module) or not now or now == before:
        return
    dtypes, devices = ({kind[n] for kind in now} for n in (0, 1))
    if dtypes != {kind[0] for kind in before} and len(dtypes) == 1:
        old.to(dtypes.pop())
    if devices != {kind[1] for kind in before} and len(devices) == 1:
        old.to(devices.pop())


def short(value: Any) -> str:
    """Return a value on one line of at most 60 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_hooks(path: str, old: nn.Module, new: nn.Module) -> None:
    """Refuse to lose a user's hooks on a module that is replaced; patches handle this package's own hooks.

    Raises:
        AttnPatchError: a hook or a parametrization of the old module is not on the new one.
    """
    kept = {id(hook) for hook in _hooks(new)}
    foreign = (hook for hook in _hooks(old) if not type(hook).__module__.startswith(f"{__package__}."))
    lost = next((hook for hook in foreign if id(hook) not in kept), None)
    if lost is None and not parametrize.is_parametrized(old):
        return
    found = "a parametrization" if lost is None else f"the hook {getattr(lost, '__name__', type(lost).__name__)}"
    raise AttnPatchError(
        f"{path}: carries {found}, which the module in its place would lose; take it off before patching, and put it "
        "on again afterwards."
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        yield from (*part._forward_hooks.values(), *part._forward_pre_hooks.values(), *part._backward_hooks.values())
