"""Runs the attention kernels of this machine on a model and compares them with eager attention in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..api import apply
from ..errors import AttnPatchError, SelfCheckFailed
from ..patches import Flash
from ..probe import TOLERANCE, largest_difference
from .decoding import alone, generated, texts
from .expected import KERNEL_MODEL, KERNELS, REFUSES, WORKS
from .models import build
from .text import clean
from .trial import CRASHES, FAILS


@dataclass(frozen=True)
class Kernel:
    """The result of one attention kernel on one device.

    Attributes:
        name: as transformers calls it.
        device: ``cpu`` or ``cuda``.
        dtype: that it ran in.
        outcome: ``works``, ``refuses`` or ``fails``.
        expected: ``works`` or ``refuses``.
        difference: to dense attention in fp32, and of cached decoding to the forward without a cache, the larger one,
            relative to the largest logit; None where it did not come to that.
        note: why it refuses or fails; empty where it works.
    """

    name: str
    device: str
    dtype: str
    outcome: str
    expected: str
    difference: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether this is not a fault."""
        return self.outcome == WORKS or (self.outcome == REFUSES and self.expected == REFUSES)


def kernels() -> tuple[Kernel, ...]:
    """Try every kernel on the CPU in fp32 and, if there is one, on the GPU in bfloat16."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return tuple(_kernel(name, device) for device in devices for name in KERNELS)


def _kernel(name: str, device: torch.device) -> Kernel:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    label = (name, device.type, str(dtype).removeprefix("torch."))
    try:
        difference = _difference(name, device, dtype)
    except SelfCheckFailed as error:
        return Kernel(*label, FAILS, WORKS, None, clean(str(error)))
    except AttnPatchError as error:
        said = clean(str(error))
        expected = REFUSES if any(words in said for words in KERNELS[name]) else WORKS
        return Kernel(*label, REFUSES, expected, None, said)
    except CRASHES as error:
        return Kernel(*label, FAILS, WORKS, None, f"{type(error).__name__}: {clean(str(error))}")
    if not difference <= TOLERANCE[dtype]:
        said = f"differs by {difference:.2g} of the largest logit, {TOLERANCE[dtype]:.0e} allowed"
        return Kernel(*label, FAILS, WORKS, difference, said)
    return Kernel(*label, WORKS, WORKS, difference)


def _difference(name: str, device: torch.device, dtype: torch.dtype) -> float:
    dense = build(KERNEL_MODEL, torch.device("cpu"), "eager")
    model = build(KERNEL_MODEL, device, "eager").to(dtype)
    apply(model, Flash(backend=name, training=False))
    prompts = texts(model)
    gaps = [largest_difference(alone(dense, prompt), alone(model, prompt)) for prompt in prompts]
    return max(*gaps, generated(model, prompts).difference)
