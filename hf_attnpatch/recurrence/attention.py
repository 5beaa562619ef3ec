"""The wrapper that gives an attention module a memory of earlier segments.

A long call is attended segment by segment inside each layer, each segment with the last keys before it, detached. That
is what running the whole model once for each segment gives, since nothing else in a decoder mixes tokens.
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
    """One attention module's memory.

    Args:
        number: in the memory.
        rotary: the module that made the angles; None where keys need not be turned.
        buffer: under which name it keeps its frequencies.
        interleaved: see :class:`RotaryPlanes`.
        first: see :class:`RotaryPlanes`.
        window: tokens that a token sees at most, itself included; None for all that it is given.
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
        """How keys are turned; None where they are not."""
        return None if self.rotary is None else self._made

    def _made(self) -> RotaryPlanes:
        found = getattr(self.rotary, self.buffer)
        if self._turning is None or self._of is not found:
            self._of, self._turning = found, RotaryPlanes(frequencies_of(found), self.interleaved, self.first)
        return self._turning

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend piece by piece, and hand over what is to be remembered."""
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
        """Attend from one piece, (batch, q, heads, d_v)."""
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
    """Return an attention module's memory, or None."""
    return wrapper_of(module, Recurrent)


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


def met(module: nn.Module, mask: Any) -> MemoryMask:
    """Return what an attention module was handed in the place of a mask.

    Raises:
        AttnPatchError: it was handed something else, or knows nothing of a memory.
    """
    if not isinstance(mask, MemoryMask) or recurrent_of(module) is None:
        raise AttnPatchError(
            f"{type(module).__name__}: got a mask of type {type(mask).__name__} in the place of the "
            "memory; masks of four dimensions are not taken together with segment recurrence. Call the model itself, "
            "not a part of it, and let generate make its own cache (no cache_implementation)."
        )
    return mask


def _known(call: AttentionCall, window: int | None) -> dict[str, Any]:
    """Return the keywords of a call that its pieces get.

    Raises:
        AttnPatchError: one of them is something that a memory knows nothing of.
    """
    names, module = roles_of(call.module).names, call.module
    given = {n: v for n, v in call.given.items() if n != names.get(words.POSITIONS)}  # flash would read documents there
    if not several_documents(given, call.query.shape[2]):
        given = {n: v for n, v in given.items() if n not in (words.PACKED, words.PACKED_KEYS)}
    name = next((name for name in _UNKNOWN if given.get(name) is not None), None)
    if name is not None:
        raise AttnPatchError(
            f"{type(module).__name__} passes {name} to its attention, of which a memory knows nothing."
        )
    asked = given.get(words.WINDOW)
    if asked is not None and asked != window:
        raise AttnPatchError(f"{type(module).__name__} asks for a window of {asked} tokens, and had one of {window}.")
    if given.get(names.get(words.WEIGHTS, "")):
        raise no_weights(module)
    return given
