"""Estimates how much logits differ by rounding alone, which depends on how well a model is conditioned.

Sums in another order differ by a few units in the last place. The outputs of all modules are changed by that much, at
random; the change of the logits is how far two correct computations may differ (a recurrent state, or a router near a
tie, makes it tens of times larger than in a plain decoder).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..probe import TOLERANCE, largest_difference

_ULPS = 8  # a sum of 64 products; half precision is summed in fp32 and rounded once
_TRIALS = 4
_CAP = 10  # times the usual tolerance: a model that is worse than this fails, and should be looked at


def rounding(model: nn.Module, logits: Callable[[], Tensor]) -> float:
    """Return the largest difference, relative to the largest logit, that rounding alone explains in a model.

    Args:
        model: in eval mode.
        logits: runs the model.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    usual, plain = TOLERANCE.get(dtype, 1e-2), logits()
    try:
        found = [largest_difference(plain, _disturbed(model, logits, seed)) for seed in range(_TRIALS)]
    except RuntimeError:  # some models recover token ids from the bits of embeddings
        return usual
    finite = [figure for figure in found if figure == figure]
    return min(max(usual, *finite, usual), _CAP * usual)


def _disturbed(model: nn.Module, logits: Callable[[], Tensor], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        ulps = _ULPS if torch.finfo(output.dtype).bits >= 32 else 1
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype) * 2 - 1
        return output * (1 + ulps * torch.finfo(output.dtype).eps * signs)

    handles = [m.register_forward_hook(disturb) for m in model.modules() if not m._modules]
    try:
        return logits()
    finally:
        for handle in handles:
            handle.remove()
