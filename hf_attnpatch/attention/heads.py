"""Which of a module's heads are here: tensor parallelism shares them among devices."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AttnPatchError


def sharding(module: nn.Module) -> tuple[int, int] | None:
    """Return the rank and the number of ranks among which tensor parallelism shares a module's rows; None without."""
    sharded = (tensor for tensor in map(_plain, module.parameters()) if isinstance(tensor, DTensor))
    for parameter in sharded:
        for number, placement in enumerate(parameter.placements):
            if placement.is_shard(0):
                return parameter.device_mesh.get_local_rank(number), parameter.device_mesh.size(number)
    return None


def _plain(tensor: Tensor) -> Tensor:
    """Return a parameter as what it is besides; the type checker takes the two classes for strangers."""
    return tensor


def share(module: nn.Module | None, heads: int, whole: int) -> slice:
    """Return which of a module's heads these are: all, or as many as a rank of tensor parallelism has.

    Args:
        module: an attention module; None where nothing is sharded.
        heads: that its queries have here.
        whole: heads that it has in all.

    Raises:
        AttnPatchError: some are missing, and no sharding over devices explains it.
    """
    if heads == whole:
        return slice(None)
    rank, ranks = (None if module is None else sharding(module)) or (0, 1)
    if heads * ranks != whole:
        raise AttnPatchError(
            f"{type(module).__name__}: queries of {heads} heads on rank {rank} of {ranks}, where the module has "
            f"{whole} in all: which of them these are is unknown."
        )
    return slice(rank * heads, (rank + 1) * heads)
