"""Position skipping: short blocks stand for long ones in training (PoSE, 2309.10400, section 3.1).

A block of L tokens is cut into chunks, and each chunk's positions are moved on by an offset that grows from chunk to
chunk, so that all distances up to the target occur while only L tokens are computed. The text itself stays contiguous.
"""

from __future__ import annotations

import hashlib
from random import Random

import torch
from transformers import PreTrainedModel

from hf_attnpatch.probe import input_device, quiet
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


def check_model(model: PreTrainedModel, target: int | None) -> None:
    """Refuses a model that ends before the target, or that ignores position ids.

    Args:
        model: to be trained.
        target: positions are below it; None where none are skipped, which any model can do.

    Raises:
        SettingsError: says which.
    """
    if target is None:
        return
    config = model.config.get_text_config(decoder=True)
    declared = getattr(config, "max_position_embeddings", None)
    limit = target if declared is None else min(target, declared)
    ids = torch.tensor([[1, 2, 3, 4]], device=input_device(model)) % config.vocab_size
    near = torch.arange(4, device=ids.device)[None]
    far = torch.tensor([[0, 1, limit - 2, limit - 1]], device=ids.device)
    with quiet(model), torch.no_grad():
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = [model(**given, position_ids=places).logits for places in (near, far)]
    if torch.equal(*found):
        raise SettingsError(
            f"data.skip_to: {type(model).__name__} does not read position ids as it is (with ALiBi, relative or no "
            "positions the order of the tokens counts), so that gaps would change nothing; leave skip_to out."
        )
    if limit < target:
        raise SettingsError(
            f"data.skip_to: {target} positions, and {type(model).__name__} is made for {declared}; patch it for more "
            "(a larger factor, a longer table), or lower skip_to."
        )


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
