"""Shared key-value heads inside a patched model: a projection that repeats them, and a hook that caches them once.

Neither holds a reference to the model or a closure, so that ``deepcopy``, pickling and two models in one process work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import Cache

from ..errors import AttnPatchError
from ..upstream.caches import Storing, view
from ..upstream.partitioned import shape_of


class GroupedProjection(nn.Module):
    """A key, value or fused projection with fewer heads than its attention module expects.

    The weight has one block of rows for each *shared* head; the output repeats it for every query head that uses it, so
    that a forward which knows nothing of groups runs unchanged. It contains no ``nn.Linear`` on purpose: a LoRA on its
    output would see the repeated width, so PEFT refuses it by name instead of failing in the forward.

    Args:
        weight: shape (narrow_heads * head_dim, in_features).
        bias: shape (narrow_heads * head_dim,), or None.
        index: shape (wide_heads,), int64, on the CPU: the narrow block of ``head_dim`` rows that each block of the
            output repeats. Not a buffer: transformers builds models on the meta device, where a buffer that no
            checkpoint holds would lose its numbers.
        head_dim: rows in a block.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, index: Tensor, head_dim: int):
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.index, self.head_dim = index, head_dim

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Project and repeat: (..., in_features) -> (..., wide_heads * head_dim)."""
        if self.index.device != hidden_states.device:
            self.index = self.index.to(hidden_states.device)
        narrow = F.linear(hidden_states, self.weight, self.bias)
        blocks = narrow.view(*narrow.shape[:-1], -1, self.head_dim)
        return blocks.index_select(-2, self.index).flatten(-2)

    def extra_repr(self) -> str:
        """Show the widths."""
        rows, width = shape_of(self.weight)
        shared, wide = rows // self.head_dim, len(self.index)
        return f"in={width}, heads={shared}, repeated to {wide}, head_dim={self.head_dim}"


class NarrowCache:
    """Forward pre-hook of an attention module: makes it cache one key and value for each shared head.

    The module passes repeated keys and values to its cache. This hook replaces the cache by a view that stores the
    first head of each group and repeats it on the way out, so that the cache shrinks by the group size.

    Args:
        groups: query heads per key-value head.
        contiguous: whether the module calls ``view`` on what the cache returns, so that a head shared by all is copied.
    """

    def __init__(self, groups: int, contiguous: bool):
        self.groups, self.contiguous = groups, contiguous

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace every cache among the arguments by its narrow view."""
        return tuple(map(self._narrow, args)), {name: self._narrow(value) for name, value in kwargs.items()}

    def _narrow(self, value: Any) -> Any:
        return view(value, self.stored) if isinstance(value, Cache) else value

    def stored(self, storing: Storing, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the first head of each group and return all heads: (batch, heads, length, head_dim) twice.

        Raises:
            AttnPatchError: the cache was filled, or made, for another number of heads.
        """
        shared = key[:, :: self.groups]
        passed_by = getattr(storing.cache, "passed_by", False)  # a segment memory, which the module's wrapper fills
        layers, number = () if passed_by else getattr(storing.cache, "layers", ()), storing.layer
        held = getattr(layers[number], "keys", None) if number < len(layers) else None
        if isinstance(held, Tensor) and held.dim() == 4 and held.shape[1] != shared.shape[1]:
            raise AttnPatchError(
                f"the cache holds {held.shape[1]} key-value heads and this model has {shared.shape[1]}: it was filled "
                "or made for another model. A learned prefix (PEFT's prefix tuning) is made and trained after the "
                "patch; a static cache takes its number of heads from the config."
            )
        keys, values = storing.store(shared, value[:, :: self.groups])
        keys, values = _repeat(keys, self.groups), _repeat(values, self.groups)
        return (keys.contiguous(), values.contiguous()) if self.contiguous else (keys, values)


def _repeat(states: Tensor, groups: int) -> Tensor:
    """(batch, shared, length, dim) -> (batch, shared * groups, length, dim), a view where one head is shared by all."""
    batch, shared, length, dim = states.shape
    return states[:, :, None].expand(batch, shared, groups, length, dim).reshape(batch, shared * groups, length, dim)


__all__ = ["GroupedProjection", "NarrowCache"]
