"""Attention functions for transformers' registry that see distances as a module's span says, and their masks.

The mask of a module that looks back at everything is the position of each key, counted without padding: (batch or 1,
1, 1, k), int64, -1 where there is no key. It says where the queries stand, whatever the cache, in linear memory.
Modules without a span (sliding windows, layers without rotation) are served as the kernel of the name would serve them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional import spanned
from ..positions.alibi_attention import causal_of, scale_of
from ..positions.alibi_attention import eager as dense
from ..upstream import words
from ..upstream.calls import CAUSAL, eager_mask, sdpa_attention, sdpa_mask
from .modules import Listener, Spanned, span_of

Output = tuple[Tensor, Tensor | None]
_REFUSED = (words.SCORE_BIAS, words.CACHE)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Output:
    """Torch's flash kernels: as they are within the trained length, merged beyond it."""
    found, places = _found(module, query, key, mask, kwargs), _places(mask)
    if found is None or spanned.all_plain(_needed(module, places), found.span):
        mask = mask if places is None else _ordinary(places, query.shape[2], key.shape[2])
        out: Output = sdpa_attention(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out
    _refuse(module, {**kwargs, words.DROPOUT: dropout}, *_REFUSED, words.SOFTCAP, words.SINKS, words.DROPOUT)
    states = (query, key, value, _needed(module, places))
    merged = spanned.attend(*states, found.span, found.turning(), scale_of(query, scaling))
    return merged.transpose(1, 2).contiguous(), None


def eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Output:
    """Every score in memory, in fp32: the only one that returns attention weights."""
    found, places = _found(module, query, key, mask, kwargs), _places(mask)
    if found is None:
        mask = mask if places is None else _added(_ordinary(places, query.shape[2], key.shape[2], True))
        given: dict[str, Any] = {words.SCALING: scaling, words.IS_CAUSAL: is_causal}
        given |= {words.SOFTCAP: softcap, words.SINKS: s_aux}
        return dense(module, query, key, value, mask, dropout=dropout, **given, **kwargs)
    _refuse(module, kwargs, *_REFUSED)
    where, scale = _needed(module, places), scale_of(query, scaling)
    scores = spanned.weights(query, key, where, found.span, found.turning(), scale)
    scores = (
        scores if softcap is None else (softcap * torch.tanh(scores / softcap)).masked_fill(scores.isinf(), -torch.inf)
    )
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks.to(scores)], -1)
    rows = scores.softmax(-1)[..., : key.shape[2]].nan_to_num(0.0).to(value.dtype)  # nan: a query that is padding
    rows = F.dropout(rows, dropout, module.training)
    values = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (rows @ values).transpose(1, 2).contiguous(), rows


def place_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = CAUSAL,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function for transformers: positions of keys where attention is causal, else the kernel's own mask.

    Raises:
        AttnPatchError: a row has padding between its tokens.
    """
    if mask_function is not CAUSAL:
        whole = {**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        sizes = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
        full: Tensor = sdpa_mask(*sizes, attention_mask, **whole)
        return full
    device, end = kwargs.get("device", "cpu"), int(q_offset) + q_length
    index = torch.arange(kv_length, device=device)
    if kv_offset:  # a cache that has let go of what came after its first keys
        index = torch.where(index < kv_offset, index, index + end - kv_length)
    lead = torch.zeros(1, 1, dtype=torch.int64, device=device)
    if attention_mask is not None and not attention_mask[:, :end].all():
        lead = _leads(attention_mask[:, :end])
    places = index - lead
    return places.masked_fill((places < 0) | (index >= end), -1)[:, None, None]


def eager_place_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The same for the dense function: masks that are added where attention is not causal."""
    function = kwargs.get("mask_function", CAUSAL)
    found: Tensor | None = (place_mask if function is CAUSAL else eager_mask)(*args, **kwargs)
    return found


def _leads(keep: Tensor) -> Tensor:
    """(batch, n), bool -> (batch, 1): how much padding each row begins with. What is behind a row's end is not seen."""
    steps = keep.to(torch.int8).diff(dim=-1)
    if bool((((steps == 1).sum(-1) + keep[:, 0]) > 1).any()):
        raise AttnPatchError(
            "attention_mask has padding between the tokens of a row; positions are counted here from the first token "
            "on: pad on the left, and generate for each conversation from its whole text."
        )
    first = keep.to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(keep.any(-1, keepdim=True), first, keep.shape[-1])


def _found(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Spanned | None:
    found = span_of(module)
    if isinstance(found, Listener):
        found.calls.append((query.detach(), key.detach(), mask, kwargs))
        return None
    return found


def _places(mask: Tensor | None) -> Tensor | None:
    return mask[:, 0, 0] if mask is not None and mask.dtype == torch.int64 else None


def _needed(module: nn.Module, places: Tensor | None) -> Tensor:
    if places is None:
        raise AttnPatchError(
            f"{type(module).__name__}: attention here is causal over one text for each row, left-padded or not; found "
            "a mask of four dimensions, packed documents, or image blocks. Pass a mask of two dimensions and no "
            "position_ids, or revert the patch."
        )
    return places


def _ordinary(places: Tensor, queries: int, keys: int, always: bool = False) -> Tensor | None:
    """Return the mask that transformers would have made: None where the kernel's own causality says it all."""
    places = places[:, :keys]
    end = int((places >= 0).any(0).nonzero().max()) + 1
    padded, start = bool((places[:, 0] < 0).any()), end - queries
    if not always and not padded and (start == 0 if queries > 1 else end == places.shape[1]):
        return None
    here = torch.arange(start, end, device=places.device)[:, None]
    seen = torch.arange(places.shape[1], device=places.device) <= here
    return ((places >= 0)[:, None] & seen)[:, None]


def _added(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def _refuse(module: nn.Module, given: dict[str, Any], *names: str) -> None:
    for name in names:
        if not (given.get(name) is None or (name == words.DROPOUT and not given[name])):
            raise AttnPatchError(
                f"{type(module).__name__} passes {name} to its attention, which flash calls cannot be merged with; "
                "backend='eager' takes softcap, s_aux and dropout."
            )


__all__ = ["causal_of", "eager", "eager_place_mask", "place_mask", "sdpa"]
