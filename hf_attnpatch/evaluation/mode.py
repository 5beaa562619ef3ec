"""Eval mode and device of a model that is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..interruption import ensured, entered


@contextlib.contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode without gradients, and restore the mode of each module."""
    modes = [(module, module.training) for model in models for module in model.modules()]

    def put_back() -> None:
        for module, training in modes:
            module.training = training

    with ensured(put_back), entered(torch.no_grad()):
        for model in models:
            model.eval()
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs; Accelerate's hooks move them on if weights are offloaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
