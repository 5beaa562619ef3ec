"""Invariants of kernels: every attention kernel of the family gives the same logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.registry import FUSED
from ..backends import FLAG, Candidate, obstacle
from ..edits import SetAttention, tried
from ..probe import TOLERANCE
from .subject import Answer, Subject, compare


def eager_agrees(subject: Subject) -> Answer:
    """Eager attention agrees with the present one."""
    return _agrees(subject, "eager")


def sdpa_agrees(subject: Subject) -> Answer:
    """Torch's scaled dot-product attention agrees with the present one."""
    return _agrees(subject, "sdpa")


def flex_agrees(subject: Subject) -> Answer:
    """Flex attention agrees with the present one, forward only."""
    return _agrees(subject, "flex_attention")


def _agrees(subject: Subject, name: str) -> Answer:
    model, present = subject.model, subject.model.config._attn_implementation
    kernel = next((known for known in ("eager", *FLAG) if present.endswith(known)), present)
    if kernel.endswith(FUSED):
        return "its forwards stay, and only ask for masks"
    prefix = present.removesuffix(kernel)  # a model with a patch in its attention asks for functions that know it
    if prefix + name == present:
        return "it is the present one"
    head_dim = max((site.head_dim for site in subject.anatomy.sites), default=0)
    why = None if name == "eager" else obstacle(name, Candidate(model, model.dtype, head_dim, training=False))
    if why is not None:
        return why
    wanted = subject.logits()
    try:
        found = _under(subject, prefix + name)
        if found is None:
            return f"{type(model).__name__} chooses its attention when it is built"
    except (ImportError, NotImplementedError, ValueError) as error:
        return " ".join(f"it refuses: {error}".split())[:160]
    return compare(subject, wanted, found, max(subject.rounding, TOLERANCE[torch.float32]))  # eager sums in fp32


def _under(subject: Subject, name: str) -> Tensor | None:
    """Return the logits under another kernel, or None if transformers keeps the present one with a log line."""
    with tried(subject.model, [SetAttention("", name)]):
        return subject.logits() if subject.model.config._attn_implementation == name else None
