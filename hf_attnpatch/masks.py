"""Transformers' mask functions under one signature: releases before 5.3 tell queries by ``cache_position``.

Everything here speaks of ``q_length`` and ``q_offset``, as newer releases do. What is registered with an older one is
wrapped on the way in, and what is called of it on the way out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import masking_utils

MaskFunction = Callable[..., Any]
BY_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters


@functools.cache
def registered(mask: MaskFunction) -> MaskFunction:
    """Return what to register for a mask function that takes ``q_length`` and ``q_offset``: always the same."""
    if not BY_POSITION:
        return mask

    def by_position(*args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        if cache_position is not None:
            where = {"q_length": len(cache_position), "q_offset": int(cache_position[0])}
            kwargs = {**kwargs, **where, "device": cache_position.device}
        return mask(*args, **kwargs)

    return by_position


@functools.cache
def called(mask: MaskFunction) -> MaskFunction:
    """Return a mask function of transformers' as one that takes ``q_length`` and ``q_offset``: always the same."""
    if not BY_POSITION:
        return mask

    def by_length(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        *args: Any,
        device: Any = "cpu",
        **kwargs: Any,
    ) -> Any:
        here = torch.arange(q_length, device=device) + q_offset
        return mask(batch_size, here, kv_length, *args, **kwargs)

    return by_length


sdpa_mask = called(masking_utils.sdpa_mask)
eager_mask = called(masking_utils.eager_mask)
flash_attention_mask = called(masking_utils.flash_attention_mask)
flex_attention_mask = called(masking_utils.flex_attention_mask)
