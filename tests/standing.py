"""Where a model and its process stand, by identity and bytes: cheap enough to be asked in 100,000 forked children."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_attnpatch.exclusive import lock_of
from hf_attnpatch.rope import request_length

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_TABLES = {
    "attention functions": AttentionInterface._global_mapping,
    "mask functions": AttentionMaskInterface._global_mapping,
    "config classes": CONFIG_MAPPING._extra_content,
}


class Standing:
    """Objects and bytes of a model, and what it is surrounded by, at one moment.

    Every object in the model, its configs and what of this package hangs on them is walked: containers must be the
    same ones, with the same objects in the same order; tensors must have the same bytes in the same place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.process = model, process(model)
        self.classes, self.containers, self.tensors = list[Any](), list[Any](), list[Any]()
        self._seen: set[int] = set()
        self.tables = [(name, table, _items(table)) for name, table in _TABLES.items()]
        self._walk("model", model)

    def _walk(self, path: str, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append((path, value, _facts(value)))
            self._walk(f"{path}.grad", value.grad if value.is_leaf else None)
        elif isinstance(value, (dict, list, tuple, set)):
            self.containers.append((path, value, _items(value)))
            for key, item in _items(value):
                self._walk(f"{path}.{key}", item)
        elif _is_walked(value):
            self.classes.append((path, value, type(value)))
            self._walk(path, vars(value))

    def difference(self) -> str | None:
        """Say what is not as it was, or None."""
        return self.difference_around() or next(self._differences(), None)

    def difference_around(self) -> str | None:
        """Say what of the process, and of transformers' tables, is not as it was, or None."""
        now = process(self.model)
        now["threads"] |= self.process["threads"]  # those that ended do not count: a fork has but one
        differing = [f"{name} of the process" for name, value in self.process.items() if now[name] != value]
        return next(iter(differing), None) or next(_changed(self.tables), None)

    def _differences(self) -> Iterator[str]:
        yield from (f"class of {path}" for path, value, kind in self.classes if type(value) is not kind)
        yield from _changed(self.containers)
        yield from (path for path, tensor, facts in self.tensors if _facts(tensor) != facts)


def _changed(containers: list[Any]) -> Iterator[str]:
    return (path for path, container, items in containers if not _same(_items(container), items))


def _is_walked(value: Any) -> bool:
    ours = type(value).__module__.partition(".")[0] == "hf_attnpatch" or hasattr(value, "_from_model_config")
    return hasattr(value, "__dict__") and (ours or isinstance(value, (nn.Module, PretrainedConfig)))


def _items(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, dict):
        return list(container.items())
    return [(id(item), item) for item in container] if isinstance(container, set) else list(enumerate(container))


def _same(found: list[tuple[Any, Any]], wanted: list[tuple[Any, Any]]) -> bool:
    return len(found) == len(wanted) and all(
        key == name and (value is old or (isinstance(old, (bool, int, float, str)) and value == old))
        for (key, value), (name, old) in zip(found, wanted, strict=True)
    )


def _facts(tensor: torch.Tensor) -> Any:
    storage, gradient = tensor.untyped_storage(), tensor.grad if tensor.is_leaf else None
    kind = (tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, id(gradient))
    return kind, storage.data_ptr(), ctypes.string_at(storage.data_ptr(), storage.nbytes())


def process(model: nn.Module) -> dict[str, Any]:
    """What torch and Python are in, which a model does not hold."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "hooks of all modules": tuple(map(len, (nn.modules.module._global_forward_hooks, _PRE))),
        "random numbers": bytes(torch.get_rng_state().numpy()),
        "signal handlers": [signal.getsignal(getattr(signal, name)) for name in _SIGNALS],
        "threads": {thread.ident for thread in threading.enumerate()},
        "told requests": (request_length._TOLD.get(), request_length._GENERATING.get()),
        "open requests": {id(k): list(v) for k, v in request_length._OPEN.items() if v},
        "lock": lock_of(model)._is_owned(),
    }


_PRE = nn.modules.module._global_forward_pre_hooks


def forget(error: BaseException) -> None:
    """Clear the frames of a traceback, which may hold on to open blocks, as does whoever drops the exception."""
    with contextlib.suppress(RuntimeError):
        traceback.clear_frames(error.__traceback__)
