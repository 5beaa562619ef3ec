"""Distillation from the unpatched self: the patched model learns the distribution that the original predicts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from recipes.loop import Batch


class Distillation:
    """Forward Kullback-Leibler divergence KL(teacher || student) of the next token, at temperature 1.

    At every position whose next token counts, both models see the same text, and the loss is the sum over the
    vocabulary of p (log p - log q), p the teacher's and q the student's probability: a plain sum in float32, so that
    the loop can divide by the tokens of the whole global batch. Equal models give exactly 0.

    Args:
        teacher: the original; put in eval mode and frozen, not wrapped by Accelerate.
        precision: the context that the teacher runs in, such as `accelerator.autocast`, so that it rounds as the
            student does.
    """

    def __init__(self, teacher: nn.Module, precision: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.precision = precision

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums the divergences.

        Args:
            model: the student; returns `.logits` of shape (batch, length, vocabulary).
            batch: `input_ids` and `labels`, each (batch, length); where the next label is -100 nothing counts.

        Returns:
            The sum of the divergences in nats (float32, scalar) and the number of tokens they are of (int64, scalar).
        """
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        counted = batch["labels"][:, 1:] != -100  # batch, length - 1
        with torch.no_grad(), self.precision():
            wanted = self.teacher(**inputs, use_cache=False).logits[:, :-1]  # batch, length - 1, vocabulary
        logits = model(**inputs, use_cache=False).logits[:, :-1]  # batch, length - 1, vocabulary
        log_p = wanted.float().log_softmax(dim=-1)
        log_q = logits.float().log_softmax(dim=-1)
        divergence = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
        return (divergence * counted).sum(), counted.sum()
