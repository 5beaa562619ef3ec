"""The attention wrapper that remaps the distances at which a module sees its keys.

Modules with a sliding window, and modules that do not rotate, have no such wrapper and use their kernel unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..attention.call import AttentionCall, Output
from ..attention.masks import AttentionMask, mask_of
from ..attention.rotation import frequencies_of
from ..attention.wrapper import Wrapper, wrapper_of
from ..errors import AttnPatchError
from ..functional import spanned
from ..functional.rerotation import RotaryPlanes
from ..functional.spans import Remapping
from ..upstream import words
from . import opaque


class RemapPositions(Wrapper):
    """Remaps the distances of one attention module.

    Neither a module nor a buffer: everything follows from the config. The frequencies are read from the rotary module,
    so that they follow it to another device and exist when it was built on the meta device.

    Args:
        span: the remapping.
        rotary: the rotary module that computes the angles.
        buffer: the name of its frequency buffer.
        interleaved: see :class:`RotaryPlanes`.
        first: see :class:`RotaryPlanes`.
        dense: whether to compute every score, whatever the kernel; used as a reference.
    """

    name, order = "distances", 2

    def __init__(
        self, span: Remapping, rotary: nn.Module, buffer: str, interleaved: bool, first: int, *, dense: bool = False
    ):
        self.span, self.rotary, self.buffer, self.interleaved, self.first = span, rotary, buffer, interleaved, first
        self.dense, self.number = dense, opaque.number_of(span)

    def __repr__(self) -> str:
        return str(self.span)

    def turning(self) -> RotaryPlanes:
        """Return the rotated dimensions of a head and their frequencies."""
        return RotaryPlanes(frequencies_of(getattr(self.rotary, self.buffer)), self.interleaved, self.first)

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend by the kernel within the trained length, and by merged flash calls beyond it."""
        mask, places = _placed(call)
        if torch.compiler.is_compiling():
            return self._in_a_graph(call, places, inner)
        if self.dense or call.kernel == "eager":
            return self._dense(call, places)
        if mask.once("last", lambda: int(places.max())) < self.span.plain:
            return inner(call)
        _refuse(call, words.SCORE_BIAS, words.CACHE, words.SOFTCAP, words.DROPOUT)
        turning, states = self.turning(), (call.query, call.key, call.value)
        queries, key = call.query.shape[2], call.key
        steps = None
        if queries <= spanned.FEW:  # shared by all layers with the same rotation
            form = (
                self.span,
                id(getattr(self.rotary, self.buffer)),
                self.interleaved,
                self.first,
                queries,
                key.dtype,
                key.device,
            )
            steps = mask.once(form, lambda: (spanned.towards(places, queries, self.span, turning, key.dtype), turning))[
                0
            ]
        out = spanned.attend(*states, places, self.span, turning, call.scale, steps, call.given.get(words.SINKS))
        return out.transpose(1, 2).contiguous(), None

    def _in_a_graph(self, call: AttentionCall, places: Tensor, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend by an opaque operation inside a compiled graph; it bounds the positions by the number of columns."""
        if call.key.shape[2] <= self.span.plain:
            return inner(call)
        _refuse(call, words.SCORE_BIAS, words.CACHE, words.SOFTCAP, words.DROPOUT)
        turning = self.turning()
        settings = (turning.frequencies, self.number, turning.interleaved, turning.first, call.scale)
        sinks = call.given.get(words.SINKS)
        out: Tensor = opaque.attend(call.query, call.key, call.value, places, sinks, *settings)
        return out.transpose(1, 2).contiguous(), None

    def _dense(self, call: AttentionCall, places: Tensor) -> Output:
        """Attend densely in fp32: the only way that returns attention weights."""
        _refuse(call, words.SCORE_BIAS, words.CACHE)
        key, value, (softcap, sinks) = call.key, call.value, map(call.given.get, (words.SOFTCAP, words.SINKS))
        scores = spanned.weights(call.query, key, places, self.span, self.turning(), call.scale)
        if softcap is not None:
            scores = (softcap * torch.tanh(scores / softcap)).masked_fill(scores.isinf(), -torch.inf)
        if sinks is not None:
            more = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat([scores, more.to(scores)], -1)
        rows = scores.softmax(-1)[..., : key.shape[2]].nan_to_num(0.0).to(value.dtype)  # nan: a query that is padding
        rows = F.dropout(rows, call.dropout, call.module.training)
        values = value.repeat_interleave(call.query.shape[1] // key.shape[1], 1)
        return (rows @ values).transpose(1, 2).contiguous(), rows


def span_of(module: nn.Module) -> RemapPositions | None:
    """Return the remapping that a patch of this package gave a module, or None."""
    return wrapper_of(module, RemapPositions)


def _placed(call: AttentionCall) -> tuple[AttentionMask, Tensor]:
    """Return the mask of a call and the positions of its keys.

    Raises:
        AttnPatchError: attention is not causal over one text for each row.
    """
    if call.kernel.startswith("flash"):
        raise AttnPatchError(
            f"{type(call.module).__name__}: {call.kernel} does not say which keys are padding, as merged calls "
            "need; model.set_attn_implementation('attnpatch_sdpa') attends by torch's flash kernel."
        )
    made = mask_of(call.mask)
    places = None if made is None else made.positions()
    places = None if places is None else places.to(call.query.device)
    if made is None or places is None:
        raise AttnPatchError(
            f"{type(call.module).__name__}: attention here is causal over one text for each row, left-padded or not; "
            "found a mask of four dimensions, packed documents, or image blocks. Pass a mask of two dimensions and no "
            "position_ids (in torch.compile, too, where transformers cannot see that a text without a mask is one "
            "document), or revert the patch."
        )
    return made, places


def _refuse(call: AttentionCall, *names: str) -> None:
    for name in names:
        if not (call.given.get(name) is None or (name == words.DROPOUT and not call.given[name])):
            raise AttnPatchError(
                f"{type(call.module).__name__} passes {name} to its attention, with which flash calls cannot be "
                "merged; backend='eager' takes softcap and dropout."
            )
