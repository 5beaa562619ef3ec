"""Which attention modules ask transformers' registry for their attention function: seen in their code, or by running.

A forward that names the registry asks it. One that does not may reach it through something else, such as a function, a
property or a decorator: then the model's class is run once on the meta device with an attention function that listens.
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

_LISTENING = "listening_without_data"  # a name with a kernel's name in it is refused by families that have none of it

_ASK: set[type] = set()  # classes of modules that were heard
_RUN: set[type] = set()  # classes of models that were run


def dispatches(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a module computes attention by the function that is registered under the model's implementation.

    Args:
        model: that the module belongs to; only read.
        module: an attention module of it.
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
    """Make the listening function known; the name stays, as all names of this package do."""
    AttentionMaskInterface.register(_LISTENING, _no_mask)
    AttentionInterface.register(_LISTENING, _heard)


def _listen(model: PreTrainedModel) -> None:
    register_listening()
    try:
        twin = skeleton(model, attention=_LISTENING).eval()
    except (*FAILURES, ImportError, StrictDataclassError):
        return  # what cannot be built so is known by its code alone
    run_without_data(twin)


def _heard(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Take note of the module, and return what has the shape of its output."""
    values = [*args, *kwargs.values()]
    _ASK.update(type(value) for value in values if isinstance(value, nn.Module))
    query, _, value = [v for v in values if isinstance(v, Tensor) and v.dim() == 4][:3]
    return torch.empty(*query.transpose(1, 2).shape[:3], value.shape[-1], device=query.device, dtype=query.dtype), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
