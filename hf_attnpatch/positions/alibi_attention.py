"""Attention functions for transformers' registry that add ALiBi to modules which carry it, one for each kernel.

A module without it (cross-attention, an image tower) is served as the kernel of the name would serve it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.biased import Sight, attend, bias_rows, hiding, positions
from ..fused.sight import read_sight
from ..upstream import words
from ..upstream.calls import flex_attention, flex_attention_mask, looks_back, sdpa_attention, several_documents
from ..upstream.find import find
from .modules import alibi_of

Output = tuple[Tensor, Tensor | None]


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
    """Torch's kernels, the bias as further dimensions."""
    found, causal = alibi_of(module), causal_of(module, is_causal)
    if found is None:
        written = _written_out(mask, causal, query, key)
        out: Output = sdpa_attention(
            module, query, key, value, written, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out
    refuse(module, kwargs, "ALiBi", words.SOFTCAP, words.SINKS, words.SCORE_BIAS, words.CACHE)
    if mask is None and several_documents(kwargs, query.shape[2]):
        refuse(module, kwargs, "ALiBi", words.PACKED)  # only flash attention reads documents from there
    distance, scale = found.distance(query.shape[1], query.dtype, module), scale_of(query, scaling)
    sight = read_sight(mask, causal, query.shape[2], key.shape[2])
    return attend(query, key, value, distance, sight, scale, dropout).transpose(1, 2).contiguous(), None


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
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Output:
    """Every score in memory, in fp32: the reference, and the only one that returns attention weights."""
    refuse(module, kwargs, "ALiBi", words.CACHE)
    found, groups = alibi_of(module), query.shape[1] // key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    keys, values = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = scale_of(query, scaling) * query.to(exact) @ keys.to(exact).transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    mask = None if mask is None else hiding(mask[..., : key.shape[2]])
    if found is not None:
        sight = Sight(causal_of(module, is_causal), mask=mask)
        rows = bias_rows(found.distance(query.shape[1], query.dtype, module), positions(query, key, sight), key, sight)
        scores = scores + rows.to(exact)
    elif mask is not None:
        scores = scores + mask
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks.to(exact)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ values).transpose(1, 2).contiguous(), weights


def flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Output:
    """Flex attention, the bias as its ``score_mod``."""
    found = alibi_of(module)
    if found is None:
        out: Output = flex_attention(
            module, query, key, value, mask, scaling=scaling, softcap=softcap, is_causal=is_causal, **kwargs
        )
        return out
    refuse(module, kwargs, "ALiBi", words.SINKS, words.SCORE_BIAS, words.CACHE, words.DROPOUT)
    if not found.exact:
        raise AttnPatchError(f"{type(module).__name__}: flex_attention has the exact bias only; pass exact=True.")
    slope = found.distance(query.shape[1], query.dtype, module).slope.to(query.device, torch.float32)
    offset = getattr(mask, "query_offset", key.shape[2] - query.shape[2])
    causal, clip = causal_of(module, is_causal), found.clip

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = score if softcap is None else softcap * torch.tanh(score / softcap)
        gap = (q + offset - k) if causal else (q + offset - k).abs()
        return score - slope[head] * (gap if clip is None else gap.clamp(max=clip))

    kernel = find("compile_friendly_flex_attention", "integrations.flex_attention", "ALiBi through flex attention")
    found_out = kernel(
        query,
        key,
        value,
        training=module.training,
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=query.shape[1] != key.shape[1],
        scale=scaling,
    )
    assert isinstance(found_out, Tensor)
    return found_out.transpose(1, 2).contiguous(), None


def flex_mask(*args: Any, **kwargs: Any) -> Any:
    """Flex attention's mask, which also says where the first query stands among the keys."""
    mask = flex_attention_mask(*args, **kwargs)
    mask.query_offset = kwargs.get("q_offset", 0) - kwargs.get("kv_offset", 0)
    return mask


def causal_of(module: nn.Module, is_causal: bool | None) -> bool:
    """Return whether attention looks back only: what is passed, else what the module says, else yes."""
    return looks_back(module, is_causal)


def scale_of(query: Tensor, scaling: float | None) -> float:
    """Return what scores are multiplied by, one over the root of the head's width unless given."""
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def refuse(module: nn.Module, given: dict[str, Any], what: str, *names: str) -> None:
    """Refuse arguments of an attention function that cannot be computed together with ``what``.

    Raises:
        AttnPatchError: one of ``names`` is given.
    """
    for name in names:
        if not (given.get(name) is None or (name == words.DROPOUT and not given[name])):
            raise AttnPatchError(
                f"{type(module).__name__} passes {name} to its attention, which this kernel cannot compute together "
                f"with {what}; backend='eager' takes softcap, s_aux and position_bias."
            )


def _written_out(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Give a causal module without a bias the mask that it expects, where ours holds the padding alone."""
    if mask is None or mask.shape[-2] != 1 or query.shape[2] == 1 or not causal:
        return mask
    here = torch.arange(query.shape[2], device=query.device)[:, None]
    return mask & (torch.arange(mask.shape[-1], device=query.device) <= here)
