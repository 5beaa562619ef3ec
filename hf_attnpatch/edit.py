"""What an edit is: one write with a claim (what it touches).

``run`` performs it and returns an :class:`Inverse`, which knows whether the write still stands and how to take it back:
the very objects that were there are put back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from .errors import AttnPatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ABSENT = object()


@dataclass(frozen=True)
class Inverse:
    """How to take one edit back.

    Attributes:
        claim: what the edit touched.
        stands: whether the edit is still in place, that is, whether taking it back would undo it and nothing else.
        undo: takes it back.
    """

    claim: str
    stands: Callable[[], bool]
    undo: Callable[[], None]


@dataclass(frozen=True)
class Edit(ABC):
    """One write to a model.

    Attributes:
        path: the module (or the config) it writes to, as in ``named_modules``; empty for the model itself.
        rung: how deep this cuts: config, attribute, attention, weights, module, hook.
    """

    rung: ClassVar[str]
    path: str

    @property
    @abstractmethod
    def claim(self) -> str:
        """What is touched; two patches with an equal claim are in conflict."""

    @abstractmethod
    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return what is there and what would be, as short texts."""

    @abstractmethod
    def run(self, model: PreTrainedModel) -> Inverse:
        """Write, and return the way back."""


def swap(store: dict[str, Any], key: str, value: Any, claim: str) -> Inverse:
    """Put ``value`` under ``key``, remembering the object, or the absence, that was there."""
    old = store.get(key, ABSENT)
    store[key] = value
    kinds = _kinds(value)

    def undo() -> None:
        if old is ABSENT:
            del store[key]
        else:
            _follow(old, value, kinds)
            store[key] = old

    return Inverse(claim, lambda: store.get(key, ABSENT) is value, undo)


def _kinds(value: Any) -> set[tuple[torch.dtype, torch.device]]:
    """Dtypes and devices of a module's real numbers; none of what is no module, or has none in memory."""
    if not isinstance(value, nn.Module):
        return set()
    tensors = (t for t in (*value.parameters(), *value.buffers()) if t.is_floating_point() and not t.is_meta)
    return {(t.dtype, t.device) for t in tensors}


def _follow(old: Any, new: Any, before: set[tuple[torch.dtype, torch.device]]) -> None:
    """Cast and move a module that comes back as the one in its place was since, with the rest of the model."""
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
    """Refuse to lose what a user has hung on a module that is replaced; patches know about hooks of this package.

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
