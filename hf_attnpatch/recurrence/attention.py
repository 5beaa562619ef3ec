"""The attention wrapper that adds a memory of earlier segments.

A long call is attended segment by segment inside each layer, each segment with the detached keys before it. Since only
attention mixes tokens in a decoder, this equals running the whole model once for each segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.call import AttentionCall, Output
from ..attention.masks import MemoryMask
from ..attention.rotation import frequencies_of
from ..attention.wrapper import Wrapper, term_of, wrapper_of
from ..errors import AttnPatchError
from ..functional.rerotation import RotaryPlanes
from ..functional.segments import Piece
from ..upstream import words
from ..upstream.calls import several_documents
from ..upstream.roles import roles_of
from .call import Call, no_weights

_UNKNOWN = (words.SCORE_BIAS, words.PACKED, words.PACKED_KEYS, words.CACHE)


class Recurrent(Wrapper):
    """The segment memory of one attention module.

    Args:
        number: index of the module in the memory.
        rotary: the rotary module that computed the angles; None if keys are not rotated.
        buffer: the name of its frequency buffer.
        interleaved: see :class:`RotaryPlanes`.
        first: see :class:`RotaryPlanes`.
        window: tokens that a token attends to at most, itself included; None for no limit.
    """

    name, order = "memory", 1

    def __init__(
        self,
        number: int,
        rotary: nn.Module | None,
        buffer: str = "",
        interleaved: bool = False,
        first: int = 0,
        *,
        window: int | None = None,
    ):
        self.number, self.rotary, self.buffer, self.window = number, rotary, buffer, window
        self.interleaved, self.first = interleaved, first
        self._turning: RotaryPlanes | None = None
        self._of: Any = None

    def __repr__(self) -> str:
        return f"memory {self.number}"

    @property
    def turning(self) -> Any:
        """The rotated dimensions of the keys; None if they are not rotated."""
        return None if self.rotary is None else self._made

    def _made(self) -> RotaryPlanes:
        found = getattr(self.rotary, self.buffer)
        if self._turning is None or self._of is not found:
            self._of, self._turning = found, RotaryPlanes(frequencies_of(found), self.interleaved, self.first)
        return self._turning

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend piece by piece, and store the new keys and values in the memory."""
        handed = met(call.module, call.mask)
        if handed.call.plain:
            out = inner(call.masked(handed.own))
        else:
            given = _known(call, self.window)
            pieces = [self._piece(call, given, handed.call, piece, inner) for piece in handed.call.pieces()]
            out = (torch.cat(pieces, 1), None)
        handed.call.write(self.number, call.key, call.value)
        return out

    def _piece(
        self,
        call: AttentionCall,
        given: Mapping[str, Any],
        memory: Call,
        piece: Piece,
        inner: Callable[[AttentionCall], Output],
    ) -> Tensor:
        """Attend with the queries of one piece, (batch, q, heads, d_v)."""
        queries = call.query[:, :, piece.start : piece.stop]
        keys, values = (
            joined(memory, piece, self.number, side, new) for side, new in enumerate((call.key, call.value))
        )
        queries, keys = turned(memory, piece, self, queries, keys)
        term = term_of(call)
        biased = term is not None and term.by_distance
        mask = memory.mask(piece, call.kernel, biased, call.query, self.window)
        out, _ = inner(call.but(queries, keys, values, given).masked(mask))
        return out


def recurrent_of(module: nn.Module) -> Recurrent | None:
    """Return the segment memory of an attention module, or None."""
    return wrapper_of(module, Recurrent)


def turned(call: Call, piece: Piece, found: Recurrent, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of a piece to consecutive positions, if they are rotated at all."""
    if found.turning is None:
        return queries, keys
    for_queries, for_keys = call.turns(piece, found.turning(), queries)
    queries = queries if for_queries is None else found.turning().turn(queries, for_queries)
    return queries, keys if for_keys is None else found.turning().turn(keys, for_keys)


def joined(call: Call, piece: Piece, layer: int, side: int, new: Tensor) -> Tensor:
    """Return the keys or values of a piece: those from memory, those of the call detached, those of the call."""
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


def met(module: nn.Module, mask: Any) -> MemoryMask:
    """Return the mask that the segment memory passes to an attention module.

    Raises:
        AttnPatchError: the module got another mask.
    """
    if not isinstance(mask, MemoryMask) or recurrent_of(module) is None:
        raise AttnPatchError(
            f"{type(module).__name__}: got a mask of type {type(mask).__name__} in the place of the "
            "memory; masks of four dimensions are not taken together with segment recurrence. Call the model itself, "
            "not a part of it, and let generate make its own cache (no cache_implementation)."
        )
    return mask


def _known(call: AttentionCall, window: int | None) -> dict[str, Any]:
    """Return the keyword arguments that each piece of a call gets.

    Raises:
        AttnPatchError: the memory does not support one of them.
    """
    names, module = roles_of(call.module).names, call.module
    given = {n: v for n, v in call.given.items() if n != names.get(words.POSITIONS)}  # to flash, packed documents
    if not several_documents(given, call.query.shape[2]):
        given = {n: v for n, v in given.items() if n not in (words.PACKED, words.PACKED_KEYS)}
    name = next((name for name in _UNKNOWN if given.get(name) is not None), None)
    if name is not None:
        raise AttnPatchError(
            f"{type(module).__name__} passes {name} to its attention, which segment memory does not support."
        )
    asked = given.get(words.WINDOW)
    if asked is not None and asked != window:
        raise AttnPatchError(
            f"{type(module).__name__} asks for a window of {asked} tokens; when it was patched, the window was "
            f"{window}."
        )
    if given.get(names.get(words.WEIGHTS, "")):
        raise no_weights(module)
    return given
