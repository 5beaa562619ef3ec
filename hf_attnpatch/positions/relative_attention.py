"""Attention functions for transformers' registry with Transformer-XL's position terms, one for each kernel.

Kernels get queries and keys with further dimensions (:mod:`hf_attnpatch.functional.relative`); a module without terms
(cross-attention, an image tower) is served as ALiBi's functions serve one without a bias: as the kernel would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.biased import Sight, hiding, positions
from ..fused.sight import read_sight
from ..upstream import words
from ..upstream.calls import flex_attention, several_documents
from . import alibi_attention, alibi_flash
from .alibi_attention import Output, causal_of, refuse, scale_of
from .relative import relative_of

_WITH = "Transformer-XL's position terms"


def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Output:
    """Torch's kernels."""
    found = relative_of(module)
    if found is None:
        return alibi_attention.sdpa(module, query, key, value, mask, **kwargs)
    refuse(module, kwargs, _WITH, words.SOFTCAP, words.SINKS, words.SCORE_BIAS, words.CACHE)
    if mask is None and several_documents(kwargs, query.shape[2]):
        refuse(module, kwargs, _WITH, words.PACKED)  # only flash attention reads documents from there
    causal, scale = causal_of(module, kwargs.get(words.IS_CAUSAL)), scale_of(query, kwargs.get(words.SCALING))
    sight = read_sight(mask, causal, query.shape[2], key.shape[2])
    out = found.attend(query, key, value, sight, scale, kwargs.get(words.DROPOUT, 0.0), module)
    return out.transpose(1, 2).contiguous(), None


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Output:
    """Every score in memory, in fp32: the reference, and the only one that returns attention weights."""
    scale = scale_of(query, scaling)
    if relative_of(module) is not None:
        hidden = None if mask is None else hiding(mask[..., : key.shape[2]])
        here = positions(query, key, Sight(causal_of(module, is_causal), mask=hidden))
        exact = torch.promote_types(query.dtype, torch.float32)
        query, key, _ = _extended(module, query.to(exact), key.to(exact), value, here, scale)
    given = {words.SCALING: scale, words.IS_CAUSAL: is_causal, **kwargs}
    return alibi_attention.eager(module, query, key, value, mask, **given)


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> Output:
    """Flex attention."""
    found, width, scale = relative_of(module), value.shape[-1], scale_of(query, scaling)
    if found is not None:
        refuse(module, kwargs, _WITH, words.SINKS, words.SCORE_BIAS, words.CACHE, words.DROPOUT)
        if isinstance(mask, Tensor):  # transformers would read scores from it, compiled past its end
            raise AttnPatchError(
                f"{type(module).__name__} passes a mask of its own, which flex_attention does not take."
            )
        offset = getattr(mask, "query_offset", key.shape[2] - query.shape[2])
        here = torch.arange(query.shape[2], device=query.device)[None] + offset
        query, key, value = _extended(module, query, key, value, here, scale)
    out, weights = flex_attention(module, query, key, value, mask, scaling=scale, **kwargs)
    return out[..., :width].contiguous(), weights


@functools.cache
def flash(name: str) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function for one generation of FlashAttention: always the same. None of it ran on a GPU."""
    plain = alibi_flash.flash(name)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        width, scale = value.shape[-1], scale_of(query, scaling)
        if relative_of(module) is not None:
            refuse(module, kwargs, _WITH, words.SINKS, words.SCORE_BIAS, words.CACHE)
            here = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)[None]
            query, key, value = _extended(module, query, key, value, here, scale)
        out, _ = plain(module, query, key, value, mask, scaling=scale, **kwargs)
        return out[..., :width].contiguous(), None

    return attention


def _extended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, here: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the further dimensions before those of queries and keys, and zeros behind those of values."""
    found = relative_of(module)
    assert found is not None
    term = found.of(query, scale, module)
    left, right = term.columns(here, key.shape[2])
    query, key = (
        torch.cat([more.expand(*states.shape[:3], -1), states], -1)
        for more, states in ((left, term.content), (right, key))
    )
    return query, key, F.pad(value, (0, query.shape[-1] - value.shape[-1]))
