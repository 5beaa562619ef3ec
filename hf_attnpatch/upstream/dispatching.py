"""Finds the attention modules that look up their attention function in transformers' registry, by code or by running.

A forward whose code names the registry dispatches. Others may reach it through a function, a property or a decorator:
then the model's class runs once on the meta device with an attention function that records its callers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..configs import skeleton
from .roles import FAILURES, run_without_data

_LISTENING = "listening_without_data"  # without a kernel's name, which families without that kernel refuse

_ASK: set[type] = set()  # classes of modules that called it
_RUN: set[type] = set()  # classes of models that were run


def dispatches(model: PreTrainedModel, module: nn.Module) -> bool:
    """Return whether a module calls the function that is registered under the model's implementation.

    Args:
        model: the module's model; only read.
        module: one of its attention modules.
    """
    kind = type(module)
    if _names_registry(kind):
        return True
    if type(model) not in _RUN:
        _RUN.add(type(model))
        _listen(model)
    return kind in _ASK


def _names_registry(kind: type[nn.Module]) -> bool:
    forward: Any = inspect.unwrap(kind.forward)
    return any(isinstance(forward.__globals__.get(name), AttentionInterface) for name in forward.__code__.co_names)


def register_listening() -> None:
    """Register the recording function; the name stays registered."""
    AttentionMaskInterface.register(_LISTENING, _no_mask)
    AttentionInterface.register(_LISTENING, _heard)


def _listen(model: PreTrainedModel) -> None:
    register_listening()
    try:
        twin = skeleton(model, attention=_LISTENING).eval()
    except (*FAILURES, ImportError, StrictDataclassError):
        return  # cannot be built: only its code tells
    run_without_data(twin)


def _heard(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Record the module, and return a tensor with the shape of its output."""
    values = [*args, *kwargs.values()]
    _ASK.update(type(value) for value in values if isinstance(value, nn.Module))
    query, _, value = [v for v in values if isinstance(v, Tensor) and v.dim() == 4][:3]
    return torch.empty(*query.transpose(1, 2).shape[:3], value.shape[-1], device=query.device, dtype=query.dtype), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
