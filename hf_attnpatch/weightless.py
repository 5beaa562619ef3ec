"""Runs a model without weights, to find from its structure how keys are rotated.

A model that is being loaded is on the meta device, where running it shows nothing; believing a record instead would be
unchecked. Here buffers (frequencies) are real, and every result that depends on a weight is random, the same in each
forward. What is computed between weights, rotation and attention, is computed.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

from .configs import building
from .interruption import ensured
from .upstream.partitioned import shape_of

_RESTORING: ContextVar[bool] = ContextVar("hf_attnpatch_restoring", default=False)
_ACTIVE: ContextVar[bool] = ContextVar("hf_attnpatch_weightless", default=False)


def is_weightless() -> bool:
    """Return whether this thread is inside :func:`weightless`, where a model runs without weights."""
    return _ACTIVE.get()


def is_restoring() -> bool:
    """Return whether this thread is inside :func:`restoring`, where a user's choices cannot be tried again."""
    return _RESTORING.get()


@contextlib.contextmanager
def restoring() -> Iterator[None]:
    """Restore the structure of a record, before the weights are loaded, for the duration of a block."""
    before = _RESTORING.get()
    with ensured(lambda: _RESTORING.set(before)):
        _RESTORING.set(True)
        yield


def runnable(model: PreTrainedModel, following: bool = False) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a model runs, without weights if they are yet to come; see :func:`weightless`."""
    return weightless(model, following) if is_restoring() else contextlib.nullcontext()


@contextlib.contextmanager
def weightless(model: PreTrainedModel, following: bool = False) -> Iterator[None]:
    """Run a model on the CPU without its parameters' data for the duration of a block; both are restored.

    Args:
        model: with or without data; nothing is written to it.
        following: whether results change with any bit of their inputs. Otherwise nothing depends on inputs before the
            last weight, so that all layers get the same.
    """
    numbers, before = _Numbers(following), _ACTIVE.get()
    ways = [*_exchanged(model), model.register_forward_pre_hook(numbers.begin).remove]

    def put_back() -> None:
        for way in ways:
            way()
        _ACTIVE.set(before)

    with ensured(put_back), torch.device("cpu"), numbers:
        _ACTIVE.set(True)
        yield


def _exchanged(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Replace parameters by ones without data and buffers by real ones; return the functions that undo it."""
    buffers = dict(_real_buffers(model)) if any(b.is_meta for b in model.buffers()) else {}
    others: dict[int, Any] = {}
    ways = []
    for path, module in model.named_modules():
        held = [(module._parameters, _without_data), (module._buffers, lambda b: _with_data(b, None))]
        for store, make in held:
            for name, tensor in list(store.items()):
                if tensor is None:
                    continue
                real = buffers.get(f"{path}.{name}".lstrip("."))
                made = _with_data(tensor, real) if store is module._buffers else make(tensor)
                ways.append(_setter(store, name, tensor))
                store[name] = others.setdefault(id(tensor), made)
    return ways


def _setter(store: dict[str, Any], name: str, tensor: Any) -> Callable[[], None]:
    return lambda: store.__setitem__(name, tensor)


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _with_data(buffer: Tensor, real: Tensor | None) -> Tensor:
    if not buffer.is_meta:
        return buffer.cpu()
    if real is not None and real.shape == buffer.shape and not real.is_meta:
        return real
    return torch.ones(buffer.shape, dtype=buffer.dtype, device="cpu")


def _real_buffers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that the model's class computes from its config, without making parameters."""
    cls: Any = getattr(type(model), "unpatched", type(model))
    with building(), torch.device("cpu"), _EmptyOnMeta():
        yield from cls(copy.deepcopy(model.config)).named_buffers()


class _EmptyOnMeta(TorchFunctionMode):
    """Creates uninitialised tensors, such as parameters, on the meta device; frequencies are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Returns random numbers for every operation on both real tensors and tensors without data."""

    def __init__(self, following: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.following, self.count = following, 0

    def begin(self, *_: object) -> None:
        """Restart the sequence, so that each forward gets the same numbers."""
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on the meta device if it needs data that is missing."""
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta") and torch.get_default_device().type == "cpu":
            kwargs["device"] = torch.device("cpu")  # the device was copied from a weight
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        real = [t for t in given if not t.is_meta]
        if len(real) == len(given):
            return func(*args, **kwargs)
        wanted = kwargs.get("device")
        shapes = _shapes(func, args, kwargs if wanted is None else {**kwargs, "device": torch.device("meta")})
        needed = func is torch.ops.aten.embedding.default or (wanted is not None and wanted.type != "meta")
        if not needed and not any(t.is_floating_point() for t in real):
            return _same(func, args, shapes)
        filled = tree_map_only(Tensor, lambda t: self._filled(t, real), shapes)
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0] if args[0].is_meta else args[0].copy_(filled)
        return filled

    def _filled(self, shape: Tensor, real: Sequence[Tensor]) -> Tensor:
        self.count += 1
        if not shape.is_floating_point():
            return torch.zeros(shape.shape, dtype=shape.dtype, device="cpu")
        seen = [t.double().sum().item() for t in real] if self.following else []
        seed = zlib.crc32(repr((self.count, seen)).encode())
        source = torch.Generator().manual_seed(seed)
        return torch.randn(shape.shape, generator=source, device="cpu").to(shape.dtype)


def _same(func: Any, args: Any, result: Any) -> Any:
    """Return the result on the meta device; an in-place operation returns its argument."""
    return args[0] if func._schema.is_mutable and isinstance(result, Tensor) and isinstance(args[0], Tensor) else result


def _shapes(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the meta device, in bfloat16 if it exists in that dtype only (grouped expert products)."""
    try:
        return func(*tree_map_only(Tensor, _shape, args), **tree_map_only(Tensor, _shape, kwargs))
    except RuntimeError:
        half = tree_map_only(Tensor, _half, (args, kwargs))
        first = next(t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and t.is_floating_point())
        return tree_map_only(Tensor, lambda t: t.to(first.dtype), func(*half[0], **half[1]))


def _shape(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _half(tensor: Tensor) -> Tensor:
    return _shape(tensor).to(torch.bfloat16) if tensor.is_floating_point() else _shape(tensor)


__all__ = ["is_restoring", "is_weightless", "restoring", "runnable", "weightless"]
