"""Layer-local refinement: fits one attention module's projections to its original by gradient descent.

The loss is the squared error of the attention output over its variance plus, for every head, the divergence of the
attention weights, KL(original || shared), as LoLCATs (2410.10254) match attention before training. Nothing is
propagated through the model; only one module's weights and a few batches are in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UnsupportedArchitecture
from .replay import Call, Taps
from .weights import HeadWeights

LEARNING_RATE = 0.04  # relative to the root mean square of each projection
EPSILON = 1e-9


@dataclass(frozen=True)
class Target:
    """One call and the original module's results.

    Attributes:
        call: inputs of the module.
        output: (tokens, out_features), float32.
        variance: of the output, a number.
        probabilities: (tokens, num_heads, length), or None if the module does not return its attention weights.
        entropy: of all of them, summed, in nats.
    """

    call: Call
    output: Tensor
    variance: Tensor
    probabilities: Tensor | None
    entropy: Tensor | None


@dataclass(frozen=True)
class Gap:
    """The distance of a conversion from the original on some text.

    Attributes:
        output: mean squared error of the attention output over its variance.
        attention: mean over heads of KL(original || shared) of the attention weights, in nats; None where unknown.
    """

    output: float
    attention: float | None


def target(socket: Taps, original: HeadWeights, call: Call) -> Target:
    """Run the original module once."""
    with torch.no_grad():
        streams = socket.run(call)
        output = original.project(streams.heads.float())
        p = rows(streams.probabilities, call)
        entropy = None if p is None else -(p * (p + EPSILON).log()).sum()
    variance = output.var().clamp_min(torch.finfo(output.dtype).tiny)  # the output of a pruned layer is zero
    return Target(call, output, variance, p, entropy)


def rows(probabilities: Tensor | None, call: Call) -> Tensor | None:
    """(batch, heads, length, keys) -> (tokens, heads, keys), float32, without the rows of padding."""
    if probabilities is None:
        return None
    by_token = probabilities.transpose(1, 2)
    return (by_token[call.tokens] if call.tokens is not None else by_token.flatten(0, 1)).float()


def losses(socket: Taps, weights: HeadWeights, wanted: Target) -> tuple[Tensor, Tensor | None]:
    """Return the relative squared error of the output, and the divergence of the attention summed over heads."""
    streams = socket.run(wanted.call, **weights.rewrites())
    error = (weights.project(streams.heads.float()) - wanted.output).square().mean() / wanted.variance
    found = rows(streams.probabilities, wanted.call)
    if found is None or wanted.probabilities is None or wanted.entropy is None:
        return error, None
    cross = -(wanted.probabilities * (found + EPSILON).log()).sum()
    return error, (cross - wanted.entropy) / len(found)


@torch.no_grad()
def gap(socket: Taps, weights: HeadWeights, wanted: Target) -> Gap:
    """Measure a conversion on one call."""
    error, divergence = losses(socket, weights, wanted)
    return Gap(float(error), None if divergence is None else float(divergence) / socket.site.num_heads)


def refine(
    socket: Taps, start: HeadWeights, targets: Sequence[Target], *, steps: int, biased: Sequence[bool], seconds: float
) -> tuple[HeadWeights, int]:
    """Refine shared heads.

    Args:
        socket: taps of the attention module.
        start: its shared weights in closed form.
        targets: used in turn, one in each step.
        steps: of Adam, with a cosine schedule of the learning rate.
        biased: whether query, key and value have a bias; the bias column of others stays zero.
        seconds: time limit.

    Returns:
        The refined weights in float32, and the steps taken.

    Raises:
        UnsupportedArchitecture: the module's attention passes no gradient to a projection.
    """
    names = ("query", "key", "value", "output")
    parameters = {name: getattr(start, name).float().clone().requires_grad_() for name in names}
    rates = {name: LEARNING_RATE * float(p.detach().square().mean().sqrt()) for name, p in parameters.items()}
    weights = replace(start, **parameters)

    def loss(step: int) -> Tensor:
        error, divergence = losses(socket, weights, targets[step % len(targets)])
        return error if divergence is None else error + divergence

    def checked(name: str, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise _no_gradient(socket, name)
        if name != "output" and not biased[names.index(name)]:
            gradient[..., -1] = 0
        return gradient

    step = descend(parameters, rates, loss, steps, seconds, checked)
    return replace(start, **{name: p.detach() for name, p in parameters.items()}), step


def descend(
    parameters: Mapping[str, Tensor],
    rates: Mapping[str, float],
    loss: Callable[[int], Tensor],
    steps: int,
    seconds: float = float("inf"),
    checked: Callable[[str, Tensor | None], Tensor] | None = None,
) -> int:
    """Descend with Adam, the learning rates falling as a cosine, and return the steps taken.

    Args:
        parameters: changed in place.
        rates: of each.
        loss: of a step, counted from 1.
        steps: at most.
        seconds: stops early after so long.
        checked: is shown each gradient, and returns the one to take.
    """
    groups = [{"params": [p], "lr": rates[name]} for name, p in parameters.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.0)
    until, step = time.monotonic() + seconds, 0
    with torch.enable_grad():
        for step in range(1, steps + 1):
            gradients = torch.autograd.grad(loss(step), list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                parameter.grad = gradient if checked is None else checked(name, gradient)
            optimizer.step()
            schedule.step()
            if time.monotonic() > until:
                break
    return step


def _no_gradient(socket: Taps, name: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{socket.site.path}: its attention passes no gradient to the {name} projection, so it cannot be refined; "
        "method='calibrated' needs none."
    )
