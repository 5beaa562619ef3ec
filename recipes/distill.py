"""Distillation from the unpatched model: the patched model learns to give the original's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recipes.loop import Batch

Precision = Callable[[], AbstractContextManager[None]]
ROOM = 2**24  # numbers of the vocabulary's distributions in float32 at a time


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

    def __init__(self, teacher: nn.Module, precision: Precision = nullcontext) -> None:
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
        counted = predicting(batch)
        with torch.no_grad(), self.precision():
            wanted = logits(self.teacher, batch)
        return divergence(logits(model, batch), wanted, counted), counted.sum()


class LayerwiseDistillation(Distillation):
    """The mean of the divergence of the next token and of the error of the attention modules' outputs.

    The error of a module is |student - teacher|^2 over the mean square of the teacher's output, which is measured once
    on a sample, so that it is a sum over tokens as well; the modules' errors are averaged. Both models run on their own
    hidden states. Matching attention outputs: LoLCATs (2410.10254), where it precedes the training of the whole.

    Args:
        teacher: as for `Distillation`.
        sites: paths of the attention modules, the same in both models.
        sample: a batch to measure the teacher's outputs on.
        precision: as for `Distillation`.
    """

    def __init__(
        self, teacher: nn.Module, sites: Sequence[str], sample: Batch, precision: Precision = nullcontext
    ) -> None:
        super().__init__(teacher, precision)
        self.sites = tuple(sites)
        with torch.no_grad(), self.precision(), outputs(self.teacher, self.sites) as found:
            logits(self.teacher, sample)
        self.scales = {path: float(found[path].float().square().mean()) for path in self.sites}

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums divergences and errors; see `Distillation`."""
        counted = predicting(batch)
        with torch.no_grad(), self.precision(), outputs(self.teacher, self.sites) as wanted:
            wanted_logits = logits(self.teacher, batch)
        with outputs(model, self.sites) as given:
            given_logits = logits(model, batch)
        errors = [
            ((given[path].float() - wanted[path].float()).square().mean(dim=-1) * counted).sum() / self.scales[path]
            for path in self.sites
        ]
        kl = divergence(given_logits, wanted_logits, counted)
        return (kl + torch.stack(errors).mean()) / 2, counted.sum()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Runs a model on a batch without its labels."""
    found: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    return found


def predicting(batch: Batch) -> Tensor:
    """Which positions predict a token that counts: (batch, length), bool; the last never does."""
    return nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))


def divergence(given: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
    """Sums KL(wanted || given) over the positions that count.

    Beside the two sets of logits it holds their gradient and, in float32, no more than `ROOM` numbers a few times over.

    Args:
        given: logits of the student, (batch, length, vocabulary).
        wanted: logits of the teacher, the same shape, without gradient.
        counted: (batch, length), bool.
    """
    total: Tensor = _Divergence.apply(given, wanted, counted)  # type: ignore[no-untyped-call]
    return total


class _Divergence(torch.autograd.Function):
    """The gradient of KL(p || q) by the logits of q is q - p: computed in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor, counted: Tensor) -> Tensor:
        """Sums the divergences and keeps their gradient."""
        gradient = given.new_empty(given.shape) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), device=given.device)
        rows, size = counted.numel(), max(1, ROOM // given.shape[-1])
        flat = [each.reshape(rows, -1) for each in (given, wanted, counted)]
        for start in range(0, rows, size):
            q, p, keep = (each[start : start + size] for each in flat)
            log_q, log_p = q.float().log_softmax(dim=-1), p.float().log_softmax(dim=-1)
            total += (nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True) * keep).sum()
            if gradient is not None:
                gradient.view(rows, -1)[start : start + size] = (log_q.exp_() - log_p.exp_()).mul_(keep)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Scales the gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


@contextmanager
def outputs(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collects what some modules return: path -> (batch, length, width); wrappers around the model do not matter.

    Raises:
        ValueError: a path is not there, or there twice.
    """
    found: dict[str, Tensor] = {}
    handles = []
    try:
        for path in sites:
            modules = [each for name, each in model.named_modules() if f".{name}".endswith(f".{path}")]
            if len(modules) != 1:
                raise ValueError(f"{path}: {len(modules)} such modules in {type(model).__name__}; wanted one.")
            handles.append(modules[0].register_forward_hook(_Keep(found, path)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Keep:
    """Forward hook that keeps a module's output."""

    def __init__(self, found: dict[str, Tensor], path: str) -> None:
        self.found, self.path = found, path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.found[self.path] = output[0] if isinstance(output, tuple) else output
