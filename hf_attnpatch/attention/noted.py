"""Base class of lazy attention states: they have a shape and a dtype, and record what is done to them."""
# ruff: noqa: D102 - the methods are those of torch.Tensor

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor


class LazyStates:
    """Looks like a tensor to the forward; ``shadow`` is a meta tensor with its shape and dtype."""

    shadow: Tensor
    knows_more: ClassVar[bool] = False  # than the keys or values beside it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        noted = next(a for a in [*args, *(kwargs or {}).values()] if isinstance(a, LazyStates))
        for each in [*args, *(kwargs or {}).values()]:
            if isinstance(each, LazyStates) and each.knows_more:
                noted = each
        method = getattr(type(noted), f"_on_{name.strip('_')}", None)
        if method is None:
            raise NotImplementedError(f"{name} on {type(noted).__name__.lower()} of attention, which is computed fused")
        return method(noted, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of {type(self).__name__.lower()} of attention, which is computed fused")

    @property
    def shape(self) -> torch.Size:
        return self.shadow.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.shadow.dtype

    @property
    def device(self) -> torch.device:
        return self._held.device

    @property
    def _held(self) -> Tensor:
        """A real tensor that this was made from."""
        raise NotImplementedError(f"{type(self).__name__} holds no tensor")

    def size(self, *dim: int) -> Any:
        return self.shadow.size(*dim)

    def dim(self) -> int:
        return self.shadow.dim()

    def _shaped(self, shadow: Tensor) -> Any:
        return replace(self, shadow=shadow)  # type: ignore[type-var]  # every subclass is a dataclass

    def view(self, *shape: Any) -> Any:
        return self._shaped(self.shadow.reshape(*shape))

    reshape = view

    def transpose(self, a: int, b: int) -> Any:
        return self._shaped(self.shadow.transpose(a, b))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wanted = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.dtype)]
        return self._shaped(self.shadow.to(wanted[0])) if wanted else self

    def float(self) -> Any:
        return self.to(torch.float32)

    def contiguous(self) -> Any:
        return self
