"""The bias that a forward which computes its own scores adds to them: by head and key, or none."""

from __future__ import annotations

from torch import Tensor

from ..functional.biased import Sight, attend_with
from .call import AttentionCall
from .wrapper import Term


class OwnBias(Term):
    """A bias that depends on head and key only, such as BLOOM's and MPT's ALiBi; for torch's kernels.

    Args:
        bias: (batch or 1, heads, k), or None.
    """

    name, what = "own_bias", "a bias of its own"

    def __init__(self, bias: Tensor | None):
        self.bias, self.by_distance = bias, bias is not None

    def attend(self, call: AttentionCall, sight: Sight) -> Tensor:
        """Attend with the bias as extra dimensions, or as rows of a matrix for few queries."""
        return attend_with(call.query, call.key, call.value, self.bias, sight, call.scale, call.dropout)
