"""Parameters that DeepSpeed ZeRO-3 has partitioned: empty, with their shape beside them."""

from __future__ import annotations

from torch import Tensor


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter that may be partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed has partitioned a parameter, so that its numbers are not here."""
    return hasattr(parameter, "ds_shape")


__all__ = ["is_partitioned", "shape_of"]
