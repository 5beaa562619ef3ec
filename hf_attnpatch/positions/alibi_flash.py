"""ALiBi on FlashAttention 2, 3 and 4: by `alibi_slopes` where the library has it, else as further dimensions.

Nothing here ran on a GPU; the tests run it against functions that stand in for the libraries and compute what those say
they compute.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.alibi import columns, extended
from ..upstream import words
from ..upstream.find import find
from ..upstream.roles import roles_of
from .alibi_attention import causal_of, scale_of
from .modules import AlibiBias, alibi_of


@functools.cache
def flash(name: str) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function for one generation of the library, ``flash_attention_2`` say: always the same."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        target = _target(query, module)  # before anything is put beside them
        query, key, value = (states.to(target) for states in (query, key, value))
        found = alibi_of(module)
        causal, scale = causal_of(module, is_causal), scale_of(query, scaling)
        packed = kwargs.get(words.PACKED) is not None or _positions(module, kwargs) is not None
        if found is not None:
            _refuse(module, found, name, causal, mask, kwargs)
            if name == "flash_attention_2" and mask is None and not packed:
                return _by_slopes(module, found, query, key, value, causal, scale, dropout, kwargs), None
        return _by_columns(module, name, found, query, key, value, mask, causal, scale, dropout, kwargs), None

    return attention


def _flash_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return find("_flash_attention_forward", "modeling_flash_attention_utils", "ALiBi on FlashAttention")(
        *args, **kwargs
    )


def _target(query: Tensor, module: nn.Module) -> torch.dtype:
    """The dtype that the library is to compute in: that of the model where queries came out of it as fp32."""
    found = find("get_target_dtype", "integrations.flash_attention", "ALiBi on FlashAttention")(query, module)
    return found if isinstance(found, torch.dtype) else query.dtype


def _positions(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    return kwargs.get(roles_of(module).names.get(words.POSITIONS, ""))


def _by_slopes(
    module: nn.Module,
    found: AlibiBias,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """FlashAttention 2 adds -slope |i + k - q - j| in fp32 by itself, also where attention looks both ways."""
    library, window = importlib.import_module("flash_attn"), kwargs.get(words.WINDOW)
    reach = (-1, -1) if window is None or key.shape[2] <= window else (window - 1, window - 1)
    out: Tensor = library.flash_attn_func(
        *(t.transpose(1, 2) for t in (query, key, value)),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
        window_size=reach,
        softcap=kwargs.get(words.SOFTCAP) or 0.0,
        alibi_slopes=found.distance(query.shape[1], query.dtype, module).slope.to(query.device, torch.float32),
    )
    return out


def _by_columns(
    module: nn.Module,
    name: str,
    found: AlibiBias | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    """Transformers' own way to the library, which unpads and unpacks; the bias travels in the states."""
    width = value.shape[-1]
    if found is not None:
        slope = found.distance(query.shape[1], query.dtype, module).slope.to(query.device)
        here = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)[None]
        query, key, value = extended(query, key, value, columns(slope, scale, here, key.shape[2], query.dtype))
    elif width != query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    out: Tensor = _flash_attention_forward(
        *(t.transpose(1, 2) for t in (query, key, value)),
        mask,
        query_length=query.shape[2],
        is_causal=causal,
        dropout=dropout,
        softmax_scale=scale,
        attn_implementation=name,
        **kwargs,
    )
    return out[..., :width].contiguous()


def _refuse(
    module: nn.Module, found: AlibiBias, name: str, causal: bool, mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    slopes = name == "flash_attention_2" and mask is None
    problems = {
        "distances are clipped": found.clip is not None,
        "the bias is rounded (exact=False)": not found.exact,
        "attention sinks": kwargs.get(words.SINKS) is not None,
        "soft-capped scores": kwargs.get(words.SOFTCAP) is not None and not slopes,
        "attention looks both ways": not causal and not slopes,
    }
    problem = next((words for words, there in problems.items() if there), None)
    if problem is not None:
        raise AttnPatchError(
            f"{type(module).__name__}: {problem}, which {name} cannot compute together with ALiBi"
            f"{' and padding' if mask is not None else ''}; choose backend='flex_attention' or 'sdpa'."
        )
