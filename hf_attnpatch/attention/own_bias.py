"""What a forward that computes its scores by itself adds to them: a bias by head and key, or nothing."""

from __future__ import annotations

from torch import Tensor

from ..functional.biased import Sight, attend_with
from .call import AttentionCall
from .wrapper import Term


class OwnBias(Term):
    """A bias that depends on head and key alone, as BLOOM's and MPT's ALiBi does; torch's kernels only.

    Args:
        bias: (batch or 1, heads, k), or None for nothing.
    """

    name, what = "own_bias", "a bias of its own"

    def __init__(self, bias: Tensor | None):
        self.bias, self.by_distance = bias, bias is not None

    def attend(self, call: AttentionCall, sight: Sight) -> Tensor:
        """Further dimensions, or rows of biases for few queries."""
        return attend_with(call.query, call.key, call.value, self.bias, sight, call.scale, call.dropout)
