"""FlashAttention 2, 3 and 4, with the term passed as ``alibi_slopes`` or as extra dimensions.

None of this has run on a GPU. The tests run it against stand-ins that compute what the libraries document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..upstream import words
from ..upstream.find import find
from ..upstream.roles import roles_of
from .call import AttentionCall
from .masks import own_mask
from .wrapper import term_of


def attention(call: AttentionCall) -> Tensor:
    """Attend by one generation of FlashAttention, (batch, q, heads, d_v)."""
    target, width = _target(call), call.value.shape[-1]  # before extra dimensions are added
    call = call.but(call.query.to(target), call.key.to(target), call.value.to(target))
    term = term_of(call)
    scale, states = call.scale, (call.query, call.key, call.value)
    if term is not None:
        packed = call.given.get(words.PACKED) is not None or _positions(call) is not None
        found = term.flash(call, packed)
        if isinstance(found, Tensor):
            return found
        states = found
    query, key, value = states
    if value.shape[-1] != query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    rest = {n: v for n, v in call.given.items() if n not in (words.DROPOUT, words.SCALING, words.IS_CAUSAL)}
    out: Tensor = _flash_attention_forward(
        *(t.transpose(1, 2) for t in (query, key, value)),
        own_mask(call),
        query_length=query.shape[2],
        is_causal=call.causal,
        dropout=call.dropout,
        softmax_scale=scale,
        attn_implementation=call.kernel,
        **rest,
    )
    return out[..., :width].contiguous()


def _flash_attention_forward(*args: Any, **kwargs: Any) -> Any:
    """Call transformers' wrapper of the library, which unpads and repads."""
    return find("_flash_attention_forward", "modeling_flash_attention_utils", "ALiBi on FlashAttention")(
        *args, **kwargs
    )


def _target(call: AttentionCall) -> torch.dtype:
    """Return the dtype in which the library computes: the model's, if the queries were upcast to fp32."""
    found = find("get_target_dtype", "integrations.flash_attention", "ALiBi on FlashAttention")(call.query, call.module)
    return found if isinstance(found, torch.dtype) else call.query.dtype


def _positions(call: AttentionCall) -> Any:
    return call.given.get(roles_of(call.module).names.get(words.POSITIONS, ""))
