"""Parameters that DeepSpeed ZeRO-3 has partitioned: empty tensors with their full shape in an attribute."""

from __future__ import annotations

from torch import Tensor


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter that may be partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a parameter, so that its data is elsewhere."""
    return hasattr(parameter, "ds_shape")


__all__ = ["is_partitioned", "shape_of"]
