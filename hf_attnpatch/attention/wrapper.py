"""Attention wrappers: code that runs around the attention of a module, held by the module as an ordered tuple."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from torch import Tensor, nn

from ..edit import Edit, Write, short, swap
from ..errors import AttnPatchError
from ..functional.biased import Sight
from .call import AttentionCall, Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD = "attention_wrappers"  # attribute of an attention module: a tuple of wrappers, outermost first
W = TypeVar("W", bound="Wrapper")


class Wrapper:
    """Runs around attention. Neither a module nor a buffer, so that a checkpoint does not contain it.

    Attributes:
        name: the kind of wrapper; a module has at most one of each.
        order: wrappers of lower order are further out.
    """

    name: ClassVar[str]
    order: ClassVar[int]

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Compute attention; by default unchanged."""
        return inner(call)


class Term(Wrapper, ABC):
    """A wrapper that adds a term to the scores, computed by each kernel in the way that suits it."""

    order = 3
    what: ClassVar[str]  # name of the term in error messages
    by_distance: bool = True  # depends on distance, so that a duplicated key would count twice

    @abstractmethod
    def attend(self, call: AttentionCall, sight: Sight) -> Tensor:
        """Return the output of torch's kernels, (batch, heads, q, d_v)."""

    def dense(self, call: AttentionCall, sight: Sight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return queries and keys in fp32 and a matrix to add to the scores, which masks as well; or None instead."""
        raise self._not_by(call)

    def flex(self, call: AttentionCall) -> Output:
        """Attend by flex attention."""
        raise self._not_by(call)

    def flash(self, call: AttentionCall, packed: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return FlashAttention's output, (batch, q, heads, d_v), or all three states with extra dimensions."""
        raise self._not_by(call)

    def _not_by(self, call: AttentionCall) -> AttnPatchError:
        return AttnPatchError(f"{type(call.module).__name__}: {call.kernel} does not compute {self.what}; use 'sdpa'.")


class Listener(Wrapper):
    """Records the attention calls of one module while a model is analysed, and changes nothing."""

    name, order = "listener", -1

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Record the call."""
        self.calls.append(call.but(call.query.detach(), call.key.detach(), call.value.detach()))
        return inner(call)


def wrappers_of(module: nn.Module) -> tuple[Wrapper, ...]:
    """Return the wrappers of a module, outermost first."""
    found: tuple[Wrapper, ...] = vars(module).get(HELD, ())
    return found


def wrapper_of(module: nn.Module, kind: type[W]) -> W | None:
    """Return the wrapper of this kind that a module has, or None."""
    for wrapper in wrappers_of(module):
        if isinstance(wrapper, kind):
            return wrapper
    return None


def term_of(call: AttentionCall) -> Term | None:
    """Return the term that is added to the scores of a call, or None."""
    found: Term | None = wrapper_of(call.module, Term) or call.term  # type: ignore[type-abstract]  # of any kind
    return found


def wrapped(module: nn.Module, wrapper: Wrapper) -> tuple[Wrapper, ...]:
    """Return a module's wrappers with one added, or replaced if there is one of its name."""
    return tuple(sorted((*without(module, wrapper.name), wrapper), key=lambda each: each.order))


def without(module: nn.Module, name: str) -> tuple[Wrapper, ...]:
    """Return a module's wrappers without the one of this name."""
    return tuple(each for each in wrappers_of(module) if each.name != name)


@dataclass(frozen=True)
class _WrapperEdit(Edit):
    rung = "attention"

    @abstractmethod
    def _change(self) -> tuple[str, Wrapper | None]:
        """Return the kind of wrapper, and the one that a module gets."""

    @property
    def claim(self) -> str:
        """The kind of wrapper at this path."""
        return f"attention wrapper {self._change()[0]} at {self.path}"

    def preview(self, model: PreTrainedModel) -> tuple[str, str]:
        """Return the present and the new wrapper of this kind."""
        kind, new = self._change()
        held = (each for each in wrappers_of(model.get_submodule(self.path)) if each.name == kind)
        return short(next(held, "-")), short(new or "-")

    def prepare(self, model: PreTrainedModel) -> Write:
        """Make the new tuple of wrappers."""
        (kind, new), module = self._change(), model.get_submodule(self.path)
        return swap(vars(module), HELD, wrapped(module, new) if new else without(module, kind), self.claim)


@dataclass(frozen=True)
class AddWrapper(_WrapperEdit):
    """Put a wrapper around the attention of a module."""

    wrapper: Wrapper

    def _change(self) -> tuple[str, Wrapper | None]:
        return self.wrapper.name, self.wrapper


@dataclass(frozen=True)
class RemoveWrapper(_WrapperEdit):
    """Remove the wrapper of a kind from around the attention of a module."""

    name: str

    def _change(self) -> tuple[str, Wrapper | None]:
        return self.name, None
