"""What stays inside a model whose positions were exchanged: hooks and modules that hold no tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import AttnPatchError
from ..functional.alibi import slopes
from ..functional.biased import Distance
from ..upstream import words
from ..upstream.roles import Roles

PREFIX = "alibi_"  # of the attention functions that add the bias, before the name of the kernel they call


class AlibiBias:
    """The slopes of a model, shared by its attention modules, which hold it as ``alibi``.

    Not a module and no buffer: slopes follow from the config, must stay exact when the model is cast, and are there
    when it is built on the meta device.

    Args:
        given: the slopes of the heads, or None for the paper's.
        clip: distances above it count as this one, or None.
        exact: whether slope times position is exact; otherwise it is rounded to the model's dtype, as BLOOM's is.
        strength: factor on the slopes, in [0, 1] while a model is warmed up to them.
        heads: query heads of the whole module, of which a rank of tensor parallelism has some; None where not read.
    """

    def __init__(
        self, given: tuple[float, ...] | None, clip: int | None, exact: bool, strength: float, heads: int | None = None
    ):
        self.given, self.clip, self.exact, self.strength = given, clip, exact, strength
        self.heads = heads if given is None else len(given)

    def __repr__(self) -> str:
        return "the paper's slopes" if self.given is None else f"{len(self.given)} given slopes"

    def distance(self, heads: int, dtype: torch.dtype, module: nn.Module | None = None) -> Distance:
        """What counts as distance, for so many heads of an attention module: all of them, or those of this rank.

        Raises:
            AttnPatchError: heads are missing, and nothing says which.
        """
        whole = heads if self.heads is None else self.heads
        if self.heads is None and module is not None and sharding(module) is not None:
            raise AttnPatchError(
                f"{type(module).__name__} is sharded over devices, and how many heads there are in all was not read: "
                "whose slopes these heads have is unknown. Load the model without tp_plan."
            )
        slope = slopes(whole) if self.given is None else torch.tensor(self.given, dtype=torch.float64)
        slope = slope[share(module, heads, whole)]
        return Distance(slope * self.strength, self.clip, None if self.exact else dtype)


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


class NoBias:
    """Held as ``alibi`` by an attention module whose own bias by distance is to be left out."""

    def __repr__(self) -> str:
        return "no bias"


class Guard:
    """Forward pre-hook: stops a model whose positions would be missing, because its attention function was exchanged.

    Args:
        config: whose attention implementation the module asks for.
        held: what the module has of this package, or None; a later patch may have taken it away.
        prefix: of the attention functions that understand it.
        what: it is called.
    """

    def __init__(self, config: Any, held: Callable[[nn.Module], Any], prefix: str, what: str):
        self.config, self.held, self.prefix, self.what = config, held, prefix, what

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look, and change nothing."""
        found = self.config._attn_implementation
        if self.held(module) is not None and not found.startswith(self.prefix):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} knows nothing of this model's "
                f"{self.what} and would drop it; model.set_attn_implementation('{self.prefix}{found}') keeps it."
            )


class Still:
    """What marks a module as turning nothing."""


class ZeroAngles(Still):
    """Forward pre-hook of a rotary module: every token stands at position 0, which turns nothing.

    Args:
        roles: of the arguments of its forward.
    """

    def __init__(self, roles: Roles):
        self.roles = roles

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put zeros in the place of the positions."""
        given = self.roles.bind(args, kwargs)
        given.put(words.POSITIONS, torch.zeros_like(given.get(words.POSITIONS)))
        return given.back()


class NoPositions(nn.Module):
    """In the place of a position table: adds nothing, at any length."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a zero that broadcasts to whatever it is added to."""
        return torch.zeros((), dtype=torch.bfloat16)  # a scalar: takes the dtype and the device of what it meets


def turns_nothing(module: nn.Module) -> bool:
    """Whether a module that rotates was set to zero angles."""
    return any(isinstance(hook, Still) for hook in module._forward_pre_hooks.values())


def bias_left_out(module: nn.Module) -> bool:
    """Whether an attention module's own bias by distance was taken out."""
    return isinstance(vars(module).get("alibi"), NoBias)


def alibi_of(module: nn.Module) -> AlibiBias | None:
    """Return the bias of an attention module that this package gave one, or None."""
    found = vars(module).get("alibi")
    return found if isinstance(found, AlibiBias) else None
