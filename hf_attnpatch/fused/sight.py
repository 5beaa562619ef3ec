"""Masks in linear memory: which keys are padding, where transformers would write a row of keys for every query.

What queries see beside padding is known from the module: everything before them, or everything. Only other masks
(windows, packed documents, a chunk on top of a cache) are written out, by transformers' own function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.biased import UNSEEN, Sight, hiding
from ..upstream.calls import BIDIRECTIONAL, CAUSAL, sdpa_mask


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = CAUSAL,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers: None, padding as (batch, 1, 1, k), or the whole mask; bool, True is seen."""
    whole = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
    if torch.compiler.is_compiling() or not _plain(q_length, kv_length, q_offset, mask_function):
        full: Tensor = sdpa_mask(*sizes, attention_mask, **whole)
        return full
    if attention_mask is None:
        return None
    short = max(0, kv_length + kv_offset - attention_mask.shape[-1])  # of a cache that is longer than the text
    keep = F.pad(attention_mask, (0, short))[:, kv_offset : kv_offset + kv_length]
    used = q_length if mask_function is CAUSAL and q_length > 1 else kv_length
    return None if keep[:, :used].all() else keep[:, None, None]


def present_key_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The same for models that want a tensor: one True where everything is seen, (1, 1, 1, 1)."""
    found = key_mask(*args, **kwargs)
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device", "cpu")) if found is None else found


def _plain(q_length: int, kv_length: int, q_offset: int | Tensor, mask_function: Callable[..., Any]) -> bool:
    """Whether padding says it all: the rest follows from the module, or the one query sees every key there is."""
    if mask_function is BIDIRECTIONAL:
        return True
    if mask_function is not CAUSAL:
        return False
    return int(q_offset) == (kv_length - 1 if q_length == 1 else 0)


def read_sight(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Sight:
    """Turn what :func:`key_mask`, or a user with a mask of four dimensions, gave into what a query sees.

    Raises:
        AttnPatchError: a causal module is told to look ahead.
    """
    if mask is None or mask.numel() == 1:
        return Sight(causal)
    if mask.shape[-2] == 1 and mask.dtype == torch.bool and mask.shape[1] == 1:
        return Sight(causal, mask[:, 0, 0])
    mask = hiding(mask[..., :keys])
    if causal and not torch.compiler.is_compiling():
        _check_causal(mask, queries, keys)
    return Sight(causal, mask=mask)


def _check_causal(mask: Tensor, queries: int, keys: int) -> None:
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > UNSEEN
    last = torch.where(visible.any(-1), keys - 1 - visible.flip(-1).to(torch.uint8).argmax(-1), -1)
    steps, counts = last.diff(dim=-1), (last[:, 1:] >= 0) & (last[:, :-1] >= 0)
    stays = (steps == 0) & counts  # of padding behind a text; of a prefix, which looks ahead, before it
    after = stays.cumsum(-1) > 0
    begins = stays[:, :1].any() and bool((stays[:, 0] & (last[:, 0] != keys - queries)).any())
    if begins or bool((counts & ~stays & ((steps != 1) | after)).any()):
        raise AttnPatchError(
            f"attention mask of shape {tuple(mask.shape)}: some of its {queries} queries see tokens after them (image "
            "blocks, a prefix) or not themselves; distance is defined here for tokens that look back only."
        )
