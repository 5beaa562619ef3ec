"""Invariants of kernels: every attention kernel of the family gives the same logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.registry import FUSED, PREFIX, TORCH, chosen, kernel_of
from ..backends import FLAG, Candidate, obstacle
from ..edits import SetAttention, tried
from ..positions.sinks import passes_sinks
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
    kernel = next((known for known in ("eager", *FLAG) if kernel_of(present).endswith(known)), present)
    if kernel.endswith(FUSED):
        return "its forwards stay, and only ask for masks"
    if name == kernel:
        return "it is the present one"
    prefix = PREFIX if present == TORCH else present.removesuffix(kernel)  # of functions that know a patch
    head_dim = max((site.head_dim for site in subject.anatomy.sites), default=0)
    why = (
        None
        if name == "eager"
        else obstacle(
            name, Candidate(model, model.dtype, head_dim, False, passes_sinks(model, subject.anatomy.dispatching))
        )
    )
    if why is not None:
        return why
    wanted = subject.logits()
    try:
        found = _under(subject, chosen(model, name) if name == "sdpa" else SetAttention("", prefix + name))
        if found is None:
            return f"{type(model).__name__} chooses its attention when it is built"
    except (ImportError, NotImplementedError, ValueError) as error:
        return " ".join(f"it refuses: {error}".split())[:160]
    return compare(subject, wanted, found, max(subject.rounding, TOLERANCE[torch.float32]))  # eager sums in fp32


def _under(subject: Subject, edit: SetAttention) -> Tensor | None:
    """Return the logits under another kernel, or None where transformers leaves the present one with a log line."""
    with tried(subject.model, [edit]):
        wanted = edit.name_for(subject.model)
        return subject.logits() if subject.model.config._attn_implementation == wanted else None
