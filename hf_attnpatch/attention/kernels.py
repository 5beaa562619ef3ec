"""The kernels beneath all wrappers: transformers' own where nothing is added to the scores, else with the term added.

A module without a term (cross-attention, an image tower) is served as its kernel would serve it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional import sinking
from ..functional.biased import Sight, hiding
from ..upstream import words
from ..upstream.calls import call_attention, flex_attention, sdpa_attention, several_documents
from . import flash
from .call import AttentionCall, Output
from .masks import own_mask, read_sight, says_nothing, tiles_of
from .wrapper import term_of, wrappers_of


def attend(call: AttentionCall, depth: int = 0) -> Output:
    """Attend through the wrappers of the module, from the one at ``depth`` on, and the kernel beneath them."""
    around = wrappers_of(call.module)
    if depth == len(around):
        return run(call)
    return around[depth].around(call, lambda inner: attend(inner, depth + 1))


def run(call: AttentionCall) -> Output:
    """Attend by the kernel itself."""
    if call.kernel.startswith("flash"):
        return flash.attention(call), None
    found: Output = _KERNELS[call.kernel](call)
    return found


def _sdpa(call: AttentionCall) -> Output:
    """Torch's kernels."""
    term, sinks = term_of(call), call.given.get(words.SINKS)
    if term is None and sinks is not None:
        return _sunk(call, sinks)
    if term is None:
        out: Output = sdpa_attention(call.module, call.query, call.key, call.value, own_mask(call), **call.given)
        return out
    call.refuse(term.what, words.SOFTCAP, words.SCORE_BIAS, words.CACHE)
    if says_nothing(call.mask) and several_documents(call.given, call.query.shape[2]):
        call.refuse(term.what, words.PACKED)  # only flash attention reads documents from there
    sight = read_sight(call.mask, call.causal, call.query.shape[2], call.key.shape[2])
    return term.attend(call, sight).transpose(1, 2).contiguous(), None


def _sunk(call: AttentionCall, sinks: Tensor) -> Output:
    """Torch's flash kernel and the sinks' share, which transformers computes from every score in memory."""
    call.refuse("sinks", words.SOFTCAP, words.SCORE_BIAS, words.CACHE)
    if says_nothing(call.mask) and several_documents(call.given, call.query.shape[2]):
        call.refuse("sinks", words.PACKED)  # only flash attention reads documents from there
    out = sinking.attend(call.query, call.key, call.value, sinks, tiles_of(call), call.scale, call.dropout)
    return out.transpose(1, 2).contiguous(), None


def _eager(call: AttentionCall) -> Output:
    """Every score in memory, in fp32: the reference, and the only one that returns attention weights."""
    term = term_of(call)
    own = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
    if term is None and own is not None:  # every modeling file has its own
        states = (call.module, call.query, call.key, call.value, own_mask(call))
        out: Output = call_attention(own, states, dict(call.given))
        return out
    call.refuse("ALiBi" if term is None else term.what, words.CACHE)
    query, key, value, given = call.query, call.key, call.value, call.given
    mask = own_mask(call) if term is None else call.mask
    mask = None if mask is None else hiding(mask[..., : key.shape[2]])
    exact, rows = torch.promote_types(query.dtype, torch.float32), None
    if term is None:
        query, key = query.to(exact), key.to(exact)
    else:
        query, key, rows = term.dense(call, Sight(call.causal, mask=mask))
    keys, values = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = call.scale * query @ keys.transpose(-1, -2)
    softcap, bias, sinks = (given.get(name) for name in (words.SOFTCAP, words.SCORE_BIAS, words.SINKS))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    rows = mask if rows is None else rows
    scores = scores if rows is None else scores + rows
    if sinks is not None:
        scores = torch.cat([scores, _expanded(sinks, scores)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    weights = F.dropout(weights, call.dropout, call.module.training)
    return (weights @ values).transpose(1, 2).contiguous(), weights


def _expanded(sinks: Tensor, scores: Tensor) -> Tensor:
    """One more score for each query: (heads,) -> (batch, heads, q, 1)."""
    return sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores)


def _flex(call: AttentionCall) -> Output:
    """Flex attention."""
    term = term_of(call)
    return term.flex(call) if term is not None else plain_flex(call)


def plain_flex(call: AttentionCall) -> Output:
    """Transformers' flex attention, on these states."""
    out: Output = flex_attention(call.module, call.query, call.key, call.value, own_mask(call), **call.given)
    return out


def refuse_tensor_mask(call: AttentionCall) -> None:
    """Refuse a mask that flex attention would read scores from, compiled past its end.

    Raises:
        AttnPatchError: the mask is a tensor.
    """
    if isinstance(call.mask, Tensor):
        raise AttnPatchError(
            f"{type(call.module).__name__} passes a mask of its own, which flex_attention does not take."
        )


_KERNELS: dict[str, Callable[[AttentionCall], Any]] = {"sdpa": _sdpa, "eager": _eager, "flex_attention": _flex}
