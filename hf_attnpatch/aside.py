"""Tensors that are made in the course of a conversion may lie in files, mapped, in the place of memory.

Without a folder nothing is written, and tensors stay what they are. With one, what a patch makes takes no more memory
than the system has to spare: pages of a mapped file are given up when room is needed, and read again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .errors import AttnPatchError

SMALL = 1 << 16  # bytes: what is smaller stays in memory


@dataclass(frozen=True)
class Place:
    """Where tensors are laid.

    Attributes:
        folder: of this run, or of the one that was killed and that it goes on from.
        source: what tells the weights that are converted from others.
    """

    folder: Path
    source: str
    numbers: Iterator[int] = field(default_factory=itertools.count)


_PLACE: ContextVar[Place | None] = ContextVar("place", default=None)


@contextlib.contextmanager
def lying_in(folder: Path, source: str) -> Iterator[None]:
    """Lay what is made in the block into files below a folder.

    Args:
        folder: made if it is not there. Whoever names it removes it.
        source: what tells the weights that are converted from others.
    """
    with written():
        folder.mkdir(exist_ok=True)
        for left in folder.glob("tensor-*"):  # of a run that was killed before it took the name off
            left.unlink()
    token = _PLACE.set(Place(folder, source))
    try:
        yield
    finally:
        _PLACE.reset(token)


def place() -> Place | None:
    """Return where tensors are laid; None where they stay in memory."""
    return _PLACE.get()


@contextlib.contextmanager
def written() -> Iterator[None]:
    """Say in one line that what is made on the way cannot be written.

    Raises:
        AttnPatchError: so.
    """
    try:
        yield
    except OSError as error:
        raise AttnPatchError(
            f"what a conversion makes on the way cannot be written ({error.strerror or error}); make room where OUT is "
            "to be, or choose another OUT."
        ) from error


def laid(tensor: Tensor) -> Tensor:
    """Return a tensor of the same numbers that lies in a file, or the tensor itself where there is no place for it.

    The file has no name any more when this returns, and goes with the tensor.

    Raises:
        AttnPatchError: it cannot be written.
    """
    where = _PLACE.get()
    if where is None or tensor.nbytes < SMALL or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    file = where.folder / f"tensor-{os.getpid()}-{next(where.numbers)}"
    flat = tensor.detach().contiguous().view(-1)
    with written():
        try:
            with open(file, "wb", buffering=0) as out:  # a full disk is an error here, and a signal in a mapping
                left = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # is a buffer
                while left:
                    left = left[out.write(left) :]
            found = torch.from_file(str(file), shared=False, size=flat.numel(), dtype=flat.dtype)
        finally:
            file.unlink(missing_ok=True)
    return found.view(tensor.shape)


__all__ = ["Place", "laid", "lying_in", "place", "written"]
