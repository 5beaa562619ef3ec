"""Turns a model that was sharded for training into a plain one, to be measured, saved and loaded."""

from __future__ import annotations

import copy

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from recipes.settings import SettingsError

UNSHARDED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU")


def check(accelerator: Accelerator) -> None:
    """Refuses what the loop cannot train correctly: it scales gradients itself, which DeepSpeed and FSDP 1 prevent.

    Raises:
        SettingsError: the launcher asked for another kind of parallelism than DDP or FSDP 2.
    """
    kind = accelerator.distributed_type
    if kind.value not in UNSHARDED and not (kind == DistributedType.FSDP and accelerator.is_fsdp2):
        raise SettingsError(
            f"{kind.value}: the recipes train with data parallelism (DDP) or FSDP 2; see recipes/accelerate/."
        )


def blueprint(accelerator: Accelerator, model: nn.Module) -> nn.Module | None:
    """Keeps a plain copy of a model that is about to be sharded, on the CPU; None if none will be."""
    return copy.deepcopy(model).cpu() if accelerator.distributed_type == DistributedType.FSDP else None


def gather(model: nn.Module, plain: nn.Module | None) -> nn.Module:
    """Copies the weights of a sharded model into its plain copy; every process calls it and gets all of them.

    Args:
        model: after training.
        plain: its blueprint, or None if it was not sharded, then `model` comes back.
    """
    if plain is None:
        return model
    device = next(model.parameters()).device
    state = model.state_dict()
    for name in state:
        if isinstance(state[name], DTensor):
            state[name] = state[name].full_tensor().cpu()
    plain.load_state_dict(state)
    return plain.to(device)
