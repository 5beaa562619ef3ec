"""Refuses models whose parameters something else holds: only plain parameters can be replaced.

A wrapper (DDP, FSDP, DeepSpeed, tensor parallelism, an adapter, a quantizer) reads the parameters when it is built. It
would not synchronise, shard or train those that a patch puts in their place.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configs import skeleton
from .edits import Edit, ReplaceModule
from .errors import UnsupportedArchitecture
from .upstream.partitioned import is_partitioned

# Module and class of wrappers that read the parameters once, when they are built, and move gradients or shards later.
_HOLDERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
)
_PLAIN = (nn.Linear, nn.Embedding, Conv1D)


def check_writable(model: PreTrainedModel) -> None:
    """Refuse models whose weights cannot be read and replaced as plain tensors.

    Raises:
        UnsupportedArchitecture: quantized, sharded, adapted, or inside a wrapper that holds the parameters.
    """
    kind = type(model).__name__
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedArchitecture(
            f"{kind} is quantized; patch the full-precision model first, then quantize the result."
        )
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise UnsupportedArchitecture(
            f"{adapted} carries an adapter (LoRA or the like), which replacing its module would throw away; "
            "patch before adding adapters, or merge_and_unload() first."
        )
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)
    holder = next(_holders(model), None)
    if holder is not None:
        raise UnsupportedArchitecture(
            f"{kind} is inside a {type(holder).__name__}, which read its parameters when it was built and would not "
            "synchronise or train those of a patch. Patch the model first, then wrap it, then make the "
            "optimizer."
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor):
        raise UnsupportedArchitecture(f"{name} is already sharded over devices; patch before fully_shard or tp_plan.")
    if is_partitioned(parameter):
        raise UnsupportedArchitecture(
            f"{name} is partitioned by DeepSpeed ZeRO-3, so that its numbers are not here; patch before there is an "
            "HfDeepSpeedConfig or TrainingArguments(deepspeed=...), save_pretrained, and load the result under ZeRO-3."
        )
    if is_traceable_wrapper_subclass(parameter):
        raise UnsupportedArchitecture(
            f"{name} is a {type(parameter).__name__}: quantized, or otherwise no plain numbers; patch the "
            "full-precision model first, then quantize the result."
        )
    if not parameter.is_floating_point():
        raise UnsupportedArchitecture(f"{name} is stored as {parameter.dtype}; patch the full-precision model.")


def _holders(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the wrappers that hold a model's parameters; a module has no reference to them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return  # wrappers need it
    found = (getattr(sys.modules.get(module), name, None) for module, name in _HOLDERS)
    kinds = tuple(kind for kind in found if kind is not None)
    parts = {id(part) for part in model.modules()}
    for thing in gc.get_objects():
        if issubclass(type(thing), kinds):  # not isinstance, which evaluates proxies
            holder: nn.Module = thing
            if id(holder) in parts or any(part is model for part in holder.modules()):
                yield holder


def check_replaced(model: PreTrainedModel, edits: Iterable[Edit]) -> None:
    """Refuse to replace modules whose class is not the one that the model's family builds.

    A subclass of a linear layer does more than multiply: it fakes quantization (torchao's QAT), holds quantized weights
    (quanto, bitsandbytes), or gathers its input. A plain module would replace it.

    Raises:
        UnsupportedArchitecture: a module has another class.
    """
    strange = [
        (edit.path, type(module))
        for edit in edits
        if isinstance(edit, ReplaceModule) and isinstance(module := model.get_submodule(edit.path), _PLAIN)
        if type(module) not in _PLAIN and not parametrize.is_parametrized(module)  # refused elsewhere
    ]
    if not strange:
        return
    own = dict(skeleton(model).named_modules())
    for path, kind in strange:
        if type(own.get(path)) is not kind:
            raise UnsupportedArchitecture(
                f"{path} is a {kind.__module__}.{kind.__name__}, which this patch would silently replace by a plain "
                "module; patch the model first, then prepare it for quantization (or whatever made that class)."
            )
