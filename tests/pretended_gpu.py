"""A GPU that is not there: tensors on it hold the CPU's numbers, say ``cuda:0`` and refuse to meet those of the CPU.

    with PretendedGpu():
        out = function(x.to(CUDA))
        assert out.device == CUDA

What is written for a GPU runs, with numbers to compare, and a tensor that was made on the CPU by mistake is an error,
as it would be there; so is an index from the CPU, which a GPU takes, but has to wait for. Kernels that the CPU has not
(flash attention of CUDA) need stand-ins of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, MPS, CPU = torch.device("cuda", 0), torch.device("mps", 0), torch.device("cpu")


class PretendedGpu(TorchFunctionMode):
    """Keeps which storages are on the GPU; whatever is computed from one is there, too. ``mps`` has no fp64."""

    def __init__(self, device: torch.device = CUDA) -> None:
        self.device = device
        self.storages: dict[int, torch.Tensor] = {}  # kept alive, so that no address is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self.device if self._here(args[0]) else CPU
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = [t for t in tensors if self._here(t)]
        asked = [torch.device(d) for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device)]
        asked += [torch.device(d) for d in (kwargs.get("device"),) if isinstance(d, str)]
        name = getattr(func, "__name__", "")
        if name == "to":  # like another tensor
            assert not any(isinstance(a, str) for a in args), "say torch.device(...)"
            asked += [self.device if self._here(t) else CPU for t in args[1:] if isinstance(t, torch.Tensor)]
        if not asked and here and any(t.dim() and t.numel() and not self._here(t) for t in tensors):
            raise RuntimeError(f"{name}: tensors on {self.device} and cpu")
        args, kwargs = tree_map(lambda a: CPU if isinstance(a, torch.device) else a, (args, kwargs))
        kwargs = {**kwargs, **({"device": CPU} if kwargs.get("device") else {})}
        out = func(*args, **kwargs)
        return self._placed(out, tensors, asked[0].type == self.device.type if asked else bool(here) and name != "cpu")

    def _placed(self, out: Any, inputs: list[torch.Tensor], here: bool) -> Any:
        """Note where results are; one that was moved gets a storage of its own."""
        found = {t.untyped_storage().data_ptr() for t in inputs}

        def place(part: Any) -> Any:
            if not isinstance(part, torch.Tensor) or self._here(part) == here or not part.numel():
                return part
            if part.untyped_storage().data_ptr() in found:
                part = part.clone()
            assert not (here and self.device == MPS and part.dtype == torch.float64), "no fp64 there"
            if here:
                self.storages[part.untyped_storage().data_ptr()] = part.detach()
            return part

        return tree_map(place, out)

    def _here(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.storages
