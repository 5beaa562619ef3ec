"""Layer-local refinement: fits one attention module's projections to its original by gradient descent.

The loss is the squared error of the attention output over its variance plus, for every head, the divergence of the
attention weights, KL(original || converted), as LoLCATs (2410.10254) match attention before they train anything.
Nothing is propagated through the model; one module's weights and a few batches are in memory. What shape the converted
module has (shared heads, a latent) is the business of its :class:`Form`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import UnsupportedArchitecture
from ..sites import Site
from .replay import Call, Taps
from .weights import HeadWeights

LEARNING_RATE = 0.04  # relative to the root mean square of each projection
EPSILON = 1e-9


class Weights(Protocol):
    """The weights of one attention module, as tensors that a dataclass holds."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    trained: ClassVar[tuple[str, ...]]

    @property
    def output(self) -> Tensor:
        """(out_features, num_heads, v_head_dim)."""

    @property
    def output_bias(self) -> Tensor | None:
        """(out_features,)."""

    def project(self, heads: Tensor) -> Tensor:
        """Return the attention output, (tokens, out_features), of what the heads give, (tokens, num_heads, dim)."""


W = TypeVar("W", bound=Weights)
W_contra = TypeVar("W_contra", bound=Weights, contravariant=True)


class Form(Protocol[W_contra]):
    """How one attention module computes with weights of some kind."""

    @property
    def site(self) -> Site:
        """The module in the original model."""

    def attend(self, weights: W_contra, call: Call) -> tuple[Tensor, Tensor | None]:
        """Return what the heads give, (tokens, num_heads, dim), and the attention weights as :func:`rows`."""

    def hold(self, name: str, gradient: Tensor) -> None:
        """Set to zero, in place, the parts of a gradient whose weights have no place in the module."""


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
        attention: mean over heads of KL(original || converted) of the attention weights, in nats; None where unknown.
    """

    output: float
    attention: float | None

    @property
    def total(self) -> float:
        """What refinement lessens, up to the number of heads."""
        return self.output + (self.attention or 0.0)


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


@dataclass(frozen=True)
class HeadForm:
    """The original module, its queries, keys and values rewritten.

    Attributes:
        socket: of the module.
        biased: whether query, key and value have a bias; the column of one that is not there stays zero.
    """

    socket: Taps
    biased: Sequence[bool] = (True, True, True)

    @property
    def site(self) -> Site:
        """The module."""
        return self.socket.site

    def attend(self, weights: HeadWeights, call: Call) -> tuple[Tensor, Tensor | None]:
        """Run it."""
        streams = self.socket.run(call, **weights.rewrites())
        return streams.heads.float(), rows(streams.probabilities, call)

    def hold(self, name: str, gradient: Tensor) -> None:
        """Keep biases zero that are not there."""
        if name != "output" and not self.biased[HeadWeights.trained.index(name)]:
            gradient[..., -1] = 0


def losses(form: Form[W], weights: W, wanted: Target) -> tuple[Tensor, Tensor | None]:
    """Return the relative squared error of the output, and the divergence of the attention summed over heads."""
    heads, found = form.attend(weights, wanted.call)
    error = (weights.project(heads) - wanted.output).square().mean() / wanted.variance
    if found is None or wanted.probabilities is None or wanted.entropy is None:
        return error, None
    cross = -(wanted.probabilities * (found + EPSILON).log()).sum()
    return error, (cross - wanted.entropy) / len(found)


@torch.no_grad()
def gap(form: Form[W], weights: W, wanted: Target) -> Gap:
    """Measure a conversion on one call."""
    error, divergence = losses(form, weights, wanted)
    return Gap(float(error), None if divergence is None else float(divergence) / form.site.num_heads)


def refine(form: Form[W], start: W, targets: Sequence[Target], *, steps: int, seconds: float) -> tuple[W, int]:
    """Refine the weights of a converted module.

    Args:
        form: of the module.
        start: its weights in closed form.
        targets: taken in turn, one a step.
        steps: of Adam, the learning rate falling as a cosine.
        seconds: stops early after so long.

    Returns:
        The refined weights in float32, and the steps taken.

    Raises:
        UnsupportedArchitecture: the module's attention passes no gradient to a projection.
    """
    parameters = {name: getattr(start, name).float().clone().requires_grad_() for name in start.trained}
    rates = {name: LEARNING_RATE * float(p.detach().square().mean().sqrt()) for name, p in parameters.items()}
    weights = replace(start, **parameters)

    def loss(step: int) -> Tensor:
        error, divergence = losses(form, weights, targets[step % len(targets)])
        return error if divergence is None else error + divergence

    def checked(name: str, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise _no_gradient(form.site, name)
        form.hold(name, gradient)
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


def _no_gradient(site: Site, name: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{site.path}: its attention passes no gradient to the {name} projection, so it cannot be refined; "
        "method='calibrated' needs none."
    )
