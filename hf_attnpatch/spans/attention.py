"""The wrapper that changes the distances at which a module sees its keys.

Modules that see a window or do not rotate have no such wrapper, and are served as their kernel would serve them.
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
from ..functional.rerotation import Turning
from ..functional.spans import Span
from ..upstream import words
from . import opaque


class Spanned(Wrapper):
    """How one attention module sees distances.

    Not a module and no buffer: everything follows from the config, and the frequencies are read where the model keeps
    them, so that they follow it to another device and are there when it was built on the meta device.

    Args:
        span: distances.
        rotary: the module that made the angles.
        buffer: under which name it keeps its frequencies.
        interleaved: see :class:`Turning`.
        first: see :class:`Turning`.
        dense: whether every score is computed, whatever the kernel: to compare with.
    """

    name, order = "distances", 2

    def __init__(
        self, span: Span, rotary: nn.Module, buffer: str, interleaved: bool, first: int, *, dense: bool = False
    ):
        self.span, self.rotary, self.buffer, self.interleaved, self.first = span, rotary, buffer, interleaved, first
        self.dense, self.number = dense, opaque.number_of(span)

    def __repr__(self) -> str:
        return str(self.span)

    def turning(self) -> Turning:
        """Return how the module's states turn."""
        return Turning(frequencies_of(getattr(self.rotary, self.buffer)), self.interleaved, self.first)

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend as the kernel does within the trained length; beyond it, by merged flash calls."""
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
        if queries <= spanned.FEW:  # the same for every layer that rotates alike
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
        """Attend by an operation that a graph does not look into; how far texts reach, it knows by their columns."""
        if call.key.shape[2] <= self.span.plain:
            return inner(call)
        _refuse(call, words.SCORE_BIAS, words.CACHE, words.SOFTCAP, words.DROPOUT)
        turning = self.turning()
        settings = (turning.frequencies, self.number, turning.interleaved, turning.first, call.scale)
        sinks = call.given.get(words.SINKS)
        out: Tensor = opaque.attend(call.query, call.key, call.value, places, sinks, *settings)
        return out.transpose(1, 2).contiguous(), None

    def _dense(self, call: AttentionCall, places: Tensor) -> Output:
        """Every score in memory, in fp32: the only way that returns attention weights."""
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


def span_of(module: nn.Module) -> Spanned | None:
    """Return how a module sees distances by a patch of this package, or None."""
    return wrapper_of(module, Spanned)


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
