"""Positions with gaps: short blocks stand for long ones in training (PoSE, 2309.10400, section 3.1).

A block of L tokens is cut into chunks, and each chunk's positions are moved on by an offset that grows from chunk to
chunk, so that all distances up to the target occur while only L tokens are computed. The text itself stays contiguous.
"""

from __future__ import annotations

import hashlib
from random import Random

import torch

from recipes.settings import SettingsError


def check(block: int, target: int, chunks: int) -> None:
    """Refuses a target that is no longer than the block, and chunks that cannot be.

    Raises:
        SettingsError: says which.
    """
    if target <= block:
        raise SettingsError(f"data.skip_to: {target} positions for blocks of {block} tokens; give more positions.")
    if not 2 <= chunks <= block:
        raise SettingsError(f"data.skip_chunks: {chunks}, for blocks of {block} tokens; wanted 2 to {block}.")


def skipped_positions(block: int, target: int, chunks: int, index: int) -> torch.Tensor:
    """Position ids of one block, the same ones whenever it is asked for.

    Args:
        block: tokens.
        target: positions are below it.
        chunks: pieces of random lengths that stay contiguous; the first one begins at position 0.
        index: of the block.

    Returns:
        Strictly ascending, shape (block,), int64.
    """
    rng = Random(hashlib.sha256(f"{block} {target} {chunks} {index}".encode()).digest())
    cuts = [*sorted(rng.sample(range(1, block), chunks - 1)), block]
    positions, offset = torch.arange(block), 0
    for start, end in zip(cuts, cuts[1:], strict=False):
        offset = rng.randint(offset, target - block)
        positions[start:end] += offset
    return positions
