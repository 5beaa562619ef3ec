"""Invariants of training: gradients arrive, and gradient checkpointing does not change them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..probe import _counting, largest_difference
from .subject import Answer, Measured, Subject


def gradients_arrive(subject: Subject) -> Answer:
    """Every trainable parameter of an attention module that runs gets a gradient."""
    anatomy = subject.anatomy
    paths = tuple(dict.fromkeys((*(s.path for s in anatomy.sites), *anatomy.unread, *anatomy.other)))
    with _counting(subject.model, paths) as calls:
        subject.run()
    ran = tuple(f"{path}." for path in paths if calls[path])  # cross-attention without an encoder does not
    named = [(n, p) for n, p in subject.model.named_parameters() if n.startswith(ran) and p.requires_grad]
    if not named:
        return "no attention module with a trainable parameter ran"
    if (why := _no_backward(subject)) is not None:
        return why
    _, gradients = _loss_and_gradients(subject, [p for _, p in named])
    pairs = zip(named, gradients, strict=True)
    without = [name for (name, _), g in pairs if g is None or not g.isfinite().all() or not g.any()]
    where = f": {', '.join(without[:3])}" if without else ""
    return Measured(len(without), 0.0, f"of {len(named)} parameters are without{where}")


def checkpointing_changes_nothing(subject: Subject) -> Answer:
    """Loss and gradients are bit-equal with gradient checkpointing (where two plain runs are)."""
    model = subject.model
    if not model.supports_gradient_checkpointing:
        return f"{type(model).__name__} does not support it"
    if (why := _no_backward(subject)) is not None:
        return why
    wanted = [p for p in model.parameters() if p.requires_grad]
    if not wanted:
        return "no parameter is trainable"
    model.train()
    _checkpoint(model, False)
    plain, again = _loss_and_gradients(subject, wanted), _loss_and_gradients(subject, wanted)
    _checkpoint(model, True)
    checkpointed = _loss_and_gradients(subject, wanted)
    noise = _distance(plain, again)
    return Measured(_distance(plain, checkpointed), noise, "relative to the largest gradient of a parameter")


def _checkpoint(model: PreTrainedModel, on: bool) -> None:
    """Switch gradient checkpointing, under the name that this transformers release uses."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}")()


def _no_backward(subject: Subject) -> str | None:
    attention = subject.model.config._attn_implementation
    if attention.endswith("flex_attention") and subject.model.device.type == "cpu":
        return "flex_attention has no backward on CPU"
    return None


def _loss_and_gradients(subject: Subject, wanted: list[nn.Parameter]) -> tuple[Any, tuple[Tensor | None, ...]]:
    torch.manual_seed(0)  # the caller keeps the random state
    with torch.enable_grad():
        loss = subject.logits().float().square().mean()
        return loss.detach(), torch.autograd.grad(loss, wanted, allow_unused=True)


def _distance(first: tuple[Any, tuple[Any, ...]], second: tuple[Any, tuple[Any, ...]]) -> float:
    found = largest_difference(first[0], second[0])
    for a, b in zip(first[1], second[1], strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and not torch.equal(a, b):
            found = max(found, largest_difference(a, b))
    return found
