"""Which of a module's heads a tensor-parallel rank holds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AttnPatchError


def sharding(module: nn.Module) -> tuple[int, int] | None:
    """Return the tensor-parallel rank and world size of a module's weights; None if they are not sharded."""
    sharded = (tensor for tensor in map(_plain, module.parameters()) if isinstance(tensor, DTensor))
    for parameter in sharded:
        for number, placement in enumerate(parameter.placements):
            if placement.is_shard(0):
                return parameter.device_mesh.get_local_rank(number), parameter.device_mesh.size(number)
    return None


def _plain(tensor: Tensor) -> Tensor:
    """Return a parameter typed as a plain tensor, for the type checker."""
    return tensor


def share(module: nn.Module | None, heads: int, whole: int) -> slice:
    """Return which heads of a module these are: all of them, or the part that a tensor-parallel rank holds.

    Args:
        module: an attention module; None if nothing is sharded.
        heads: query heads here.
        whole: query heads of the whole module.

    Raises:
        AttnPatchError: heads are missing, and no tensor parallelism explains it.
    """
    if heads == whole:
        return slice(None)
    rank, ranks = (None if module is None else sharding(module)) or (0, 1)
    if heads * ranks != whole:
        raise AttnPatchError(
            f"{type(module).__name__}: got queries of {heads} heads on rank {rank} of {ranks}, but the module has "
            f"{whole} "
            f"heads; cannot tell which of them these are."
        )
    return slice(rank * heads, (rank + 1) * heads)
