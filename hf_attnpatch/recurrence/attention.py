"""Attention with segment recurrence, on top of whatever kernel a model uses: one function and one mask for each.

A long call is attended segment by segment inside each layer, each segment with the last keys before it, detached. That
is what running the whole model once for each segment gives, since nothing else in a decoder mixes tokens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..backends import FLAG, FUSED, kernel_of, register, register_alibi, register_fused, register_relative
from ..errors import AttnPatchError
from ..functional.segments import Piece
from ..positions.modules import PREFIX as ALIBI
from ..positions.relative import PREFIX as RELATIVE
from ..upstream import words
from ..upstream.calls import call_attention, call_mask, mask_registered, several_documents
from ..upstream.roles import roles_of
from .call import CALL, Call, Handed, no_weights
from .modules import PREFIX, Recurrent, recurrent_of

BELOW = (ALIBI, RELATIVE)  # what a kernel under a memory may add by itself
Output = tuple[Tensor, Tensor | None]
_UNKNOWN = (words.SCORE_BIAS, words.PACKED, words.PACKED_KEYS, words.CACHE)


def register_recurrent() -> None:
    """Make the attention functions with recurrence known, those over positions of this package too."""
    register_alibi()
    register_relative()
    register_fused()
    AttentionMaskInterface.register(key(FUSED), mask_registered(mask(FUSED)))  # no function, as in register_fused
    for name in ("eager", *FLAG):
        for prefix in ("", *BELOW):
            register(key(prefix + name), attention(prefix + name), mask(prefix + name))


def key(kernel: str) -> str:
    """Return the name under which a kernel with recurrence is registered; positions that it adds are said first."""
    plain = kernel_of(kernel)
    return kernel.removesuffix(plain) + PREFIX + plain


def base(implementation: str) -> str | None:
    """Return the kernel under a name that :func:`key` gave, or None."""
    prefix = next((p for p in BELOW if implementation.startswith(p)), "")
    rest = implementation.removeprefix(prefix)
    return prefix + rest.removeprefix(PREFIX) if rest.startswith(PREFIX) else None


@functools.cache
def mask(kernel: str) -> Callable[..., Handed]:
    """Return the mask function of a kernel: always the same."""

    def mask_of(batch_size: int, q_length: int, *args: Any, **kwargs: Any) -> Handed:
        call = CALL.get()
        if call is None or tuple(call.tokens.keep.shape) != (batch_size, q_length):
            raise AttnPatchError(
                f"a mask of {batch_size} rows and {q_length} columns was asked for outside of the decoder that this "
                "model's memory belongs to; call the model itself, not a part of it, and let generate make its own "
                "cache (no cache_implementation)."
            )
        if not call.plain:
            return Handed(call)
        return Handed(call, call_mask(kernel, (batch_size, q_length), kwargs))

    return mask_of


@functools.cache
def attention(kernel: str) -> Callable[..., Output]:
    """Return the attention function of a kernel: always the same."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Output:
        inner, found = _inner(module, kernel), recurrent_of(module)
        assert found is not None
        call = met(module, mask).call
        if call.plain:
            out = inner(module, query, key, value, mask.own, *args, **kwargs)
        else:
            _refuse(module, found.window, query.shape[2], kwargs)
            out = (
                torch.cat(
                    [_piece(inner, kernel, module, found, call, p, query, key, value, kwargs) for p in call.pieces()], 1
                ),
                None,
            )
        call.write(found.number, key, value)
        return out

    return attend


def _piece(
    inner: Callable[..., Output],
    kernel: str,
    module: nn.Module,
    found: Recurrent,
    call: Call,
    piece: Piece,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend from one piece, (batch, q, heads, d_v)."""
    queries = query[:, :, piece.start : piece.stop]
    keys, values = (joined(call, piece, found.number, side, new) for side, new in enumerate((key, value)))
    queries, keys = turned(call, piece, found, queries, keys)
    out, _ = inner(module, queries, keys, values, call.mask(piece, kernel, query, found.window), **kwargs)
    return out


def turned(call: Call, piece: Piece, found: Recurrent, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the queries and keys of a piece to positions that go on from each other, where they turn at all."""
    if found.turning is None:
        return queries, keys
    for_queries, for_keys = call.turns(piece, found.turning(), queries)
    queries = queries if for_queries is None else found.turning().turn(queries, for_queries)
    return queries, keys if for_keys is None else found.turning().turn(keys, for_keys)


def joined(call: Call, piece: Piece, layer: int, side: int, new: Tensor) -> Tensor:
    """Keys or values of a piece: from memory, from the call detached, from the call."""
    columns, live = call.columns(piece)
    first = max(0, piece.low - call.held)
    fresh = piece.stop - live
    parts = [new[:, :, first : piece.stop if call.doubled else fresh].detach(), new[:, :, fresh : piece.stop]]
    if piece.low < call.held:
        parts.insert(0, call.before[layer][side][:, :, piece.low :])
    parts = [part for part in parts if part.shape[2]]
    assert sum(part.shape[2] for part in parts) == len(columns)
    sinks = call.sinks(piece)
    if sinks is not None:
        parts.insert(0, sinks.states(layer, side, new))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _inner(module: nn.Module, kernel: str) -> Callable[..., Output]:
    if kernel == "eager":  # every modeling file has its own
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    else:
        function = AttentionInterface()[kernel]
    if function is None:
        raise AttnPatchError(f"{type(module).__name__}: its file has no eager_attention_forward; use backend='sdpa'.")

    def attend(*args: Any, **kwargs: Any) -> Output:
        found: Output = call_attention(function, args, kwargs)
        return found

    return attend


def met(module: nn.Module, mask: Any) -> Handed:
    """Return what an attention module was handed in the place of a mask.

    Raises:
        AttnPatchError: it was handed something else, or knows nothing of a memory.
    """
    if not isinstance(mask, Handed) or recurrent_of(module) is None:
        raise AttnPatchError(
            f"{type(module).__name__}: got a mask of type {type(mask).__name__} in the place of the "
            "memory; masks of four dimensions are not taken together with segment recurrence."
        )
    return mask


def _refuse(module: nn.Module, window: int | None, queries: int, kwargs: dict[str, Any]) -> None:
    names = roles_of(module).names
    kwargs.pop(names.get(words.POSITIONS, ""), None)  # flash attention would read packed documents from them
    if not several_documents(kwargs, queries):
        for border in (words.PACKED, words.PACKED_KEYS):
            kwargs.pop(border, None)
    name = next((name for name in _UNKNOWN if kwargs.get(name) is not None), None)
    if name is not None:
        raise AttnPatchError(
            f"{type(module).__name__} passes {name} to its attention, of which a memory knows nothing."
        )
    asked = kwargs.get(words.WINDOW)
    if asked is not None and asked != window:
        raise AttnPatchError(f"{type(module).__name__} asks for a window of {asked} tokens, and had one of {window}.")
    if kwargs.get(names.get(words.WEIGHTS, "")):
        raise no_weights(module)
