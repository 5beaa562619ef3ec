"""One forward of a model with segment recurrence: visible keys, re-rotation, and what the memory keeps.

The object takes the mask's place on the way to the attention functions, so that gradient checkpointing, which drops
caches and reruns layers, finds the same memory again. It is fixed when the forward begins. Layers only add what the
next call needs, which moves into the memory once the last layer has added its part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..attention.masks import INSTEAD, AttentionMask, MemoryMask
from ..errors import AttnPatchError
from ..functional.rerotation import RotaryPlanes, Table
from ..functional.segments import NOBODY, Piece, Segments, pieces
from .forms import corner, formed
from .memory import Memory
from .sinks import Layers, Sinks, SinksOfCall


@dataclass(frozen=True, eq=False)
class Tokens:
    """The new columns of a call, on the CPU.

    Attributes:
        keep: (batch, columns), bool: True where there is no padding.
        number: (batch, columns), int64, -1 at padding.
        place: positions that the model was given, (batch, columns), int64.
    """

    keep: Tensor
    number: Tensor
    place: Tensor


class Call:
    """What attention needs in one forward.

    Args:
        segments: how rows are cut into segments.
        tokens: the new columns.
        memory: keys and values of earlier calls; None if there are none and none are to be kept.
        layers: number of attention modules that will run.
        asked_by: returns whether a mask request with this config comes from the decoder of this call.
    """

    def __init__(
        self,
        segments: Segments,
        tokens: Tokens,
        memory: Memory | None,
        layers: int,
        asked_by: Callable[[Any], bool] = bool,
    ):
        self.segments, self.tokens, self.layers, self.asked_by = segments, tokens, layers, asked_by
        self._memory, self._written, self._cache = memory, {}, {}  # type: tuple[Memory | None, Layers, dict[Any, Any]]
        none = tokens.number[:, :0]
        self.before: Layers = {} if memory is None else memory.layers
        self._held = none if memory is None else memory.number
        self._turned = none if memory is None else memory.turned
        self._count = tokens.number.new_zeros(len(none)) if memory is None else memory.count
        self._phase = self._count % segments.length
        last = tokens.keep.long().sum(1)
        trailing = bool((tokens.keep == (torch.arange(tokens.keep.shape[1]) < last[:, None])).all())
        self.aligned = trailing and bool((self._phase == self._phase[0]).all())
        self.plain = not bool(self._count.any()) and tokens.keep.shape[1] <= segments.length
        self.doubled = torch.is_grad_enabled() and not self.aligned and not self.plain
        self._numbers = torch.cat([self._held, tokens.number], 1)
        held = Sinks() if memory is None else memory.sinks
        self._sinks = SinksOfCall(held, segments.sinks, tokens.number, tokens.place) if segments.sinks else None
        self._sunk: Layers = {}

    def handed(self, mask: AttentionMask, written: bool) -> MemoryMask:
        """Return what attention modules get instead of a mask.

        Raises:
            AttnPatchError: the mask does not belong to the tokens of this call.
        """
        batch, columns = mask.asked["batch_size"], mask.asked["q_length"]
        if tuple(self.tokens.keep.shape) != (batch, columns):
            raise AttnPatchError(
                f"a mask of {batch} rows and {columns} columns was requested outside of the decoder that this "
                "model's memory belongs to; call the model itself, not a part of it, and let generate make its own "
                "cache (no cache_implementation)."
            )
        return MemoryMask(self, mask.handed(written) if self.plain else None)

    def places(self, like: Tensor) -> Tensor:
        """Return the positions of the new columns, (batch, columns), on the device of ``like``."""
        return self.tokens.place.clamp(min=0).to(like.device)

    def forget(self) -> None:
        """Keep nothing for the next call."""
        self._memory = None

    @property
    def held(self) -> int:
        """Number of columns in memory."""
        return self._held.shape[1]

    def pieces(self) -> list[Piece]:
        """Return the pieces, whose queries attend together."""
        phase, columns = int(self._phase[0]) if self.aligned else None, self.tokens.keep.shape[1]
        borders = () if self.aligned or self._sinks is None else self._borders()
        return pieces(self.segments, self.held, columns, phase, borders)

    def _borders(self) -> tuple[int, ...]:
        """Columns where a segment of any row begins: where sinks stand depends on the segment of the queries."""
        begins = (self.tokens.number != NOBODY) & (self.segments.start(self.tokens.number) == self.tokens.number)
        return tuple(begins.any(0).nonzero().flatten().tolist())

    def sinks(self, piece: Piece) -> SinksOfCall | None:
        """Return the sinks that a piece sees beside its other keys, before them; None if it sees none."""
        number = self.tokens.number[:, piece.start : piece.stop]
        seen = None if self._sinks is None else self.segments.recalled(number, self._sinks.number)
        return self._sinks if seen is not None and bool(seen.any()) else None

    def columns(self, piece: Piece) -> tuple[Tensor, int]:
        """Return the keys of a piece as columns of memory and call side by side, and how many of them are live.

        Gradients pass to the live ones, the last. Where rows differ and gradients are wanted, a key is there twice, to
        be live for queries of its own segment and detached for later ones.
        """
        end = self.held + piece.stop
        every = torch.arange(piece.low, end)
        if not self.doubled:
            return every, piece.stop - piece.start if self.aligned else end - max(piece.low, self.held)
        live = torch.arange(max(piece.low, self.held), end)
        return torch.cat([every, live]), len(live)

    def mask(self, piece: Piece, kernel: str, biased: bool, like: Tensor, window: int | None = None) -> Any:
        """Return the mask of a piece in the kernel's form; None if it is plainly causal.

        Args:
            piece: of this call.
            kernel: transformers' name of the kernel, such as ``sdpa``.
            biased: whether a distance-dependent term is added to the scores.
            like: queries, for device and dtype.
            window: tokens that a token of the layer attends to at most, itself included; None for no limit.

        Raises:
            AttnPatchError: the kernel cannot express it.
        """
        key = (piece, kernel, biased, like.device, like.dtype, window)
        if key not in self._cache:
            self._cache[key] = self._mask(piece, kernel, biased, like, window)
        return self._cache[key]

    def _mask(self, piece: Piece, kernel: str, biased: bool, like: Tensor, window: int | None) -> Any:
        sinks = self.sinks(piece)
        if kernel.startswith("flash") and window is not None:
            if sinks is not None:
                raise AttnPatchError(
                    f"{kernel}: cannot combine sinks with a sliding window; use backend='sdpa', or num_sinks=0."
                )
            window = None  # the kernel applies it
        seen, number = self._seen(piece, window), self.tokens.number[:, piece.start : piece.stop]
        if sinks is not None:
            recalled = self.segments.recalled(number, sinks.number)
            recalled = recalled if window is None else recalled & _near(number, sinks.number, window)
            seen = torch.cat([recalled, seen.expand(len(recalled), -1, -1)], 2)
        if self.doubled and (biased or kernel.startswith("flash")):
            raise AttnPatchError(
                f"{kernel}: cannot compute gradients for rows at different places in their segments. Call under "
                "torch.no_grad(), or pad on the right and read whole segments."
            )
        return formed(seen, kernel, self.tokens.keep[:, piece.start : piece.stop], like)

    def _seen(self, piece: Piece, window: int | None) -> Tensor:
        """Return which keys each query sees, (batch, q, k), bool; padding sees itself, to avoid nan."""
        number, (columns, live) = self.tokens.number[:, piece.start : piece.stop], self.columns(piece)
        keep = self.tokens.keep[:, piece.start : piece.stop]
        whole = self.aligned and bool(keep.all()) and bool((self._numbers[:, piece.low] != NOBODY).all())
        if whole and (window is None or window >= len(columns)):
            return corner(number.shape[1], len(columns))[None]  # the result if nothing is missing
        keys = self._numbers[:, columns]
        seen = self.segments.visible(number, keys)
        seen = seen if window is None else seen & _near(number, keys, window)
        if self.doubled:
            start = self.segments.start
            same = start(number)[..., None] == start(self._numbers[:, columns[-live:]])[:, None]
            seen = torch.cat([seen[..., :-live] & ~_wide(same, seen.shape[-1] - live), seen[..., -live:] & same], -1)
        back = seen.shape[2] - seen.shape[1]
        itself = torch.ones(seen.shape[1:], dtype=torch.bool).tril(back).triu(back)
        return torch.where((number == NOBODY)[..., None], itself, seen)

    def turns(self, piece: Piece, turning: RotaryPlanes, like: Tensor) -> tuple[Table | None, Table | None]:
        """Return how far to rotate the queries and the keys of a piece; None if they need no rotation.

        Only distances in tokens matter. Both are rotated to positions that continue from the first query's.
        """
        alike = (
            id(turning.frequencies),
            turning.interleaved,
            turning.first,
        )  # shared by layers of a rotary module
        key = (piece, alike, like.device, like.dtype)
        if key not in self._cache:
            number, place = (t[:, piece.start : piece.stop] for t in (self.tokens.number, self.tokens.place))
            first = (number != NOBODY).to(torch.uint8).argmax(1, keepdim=True)
            shift = place.gather(1, first) - number.gather(1, first)
            columns, _ = self.columns(piece)
            turned, keys = torch.cat([self._turned, self.tokens.place], 1)[:, columns], self._numbers[:, columns]
            sinks = self.sinks(piece)
            if sinks is not None:
                near = self.segments.drawn_near(number.gather(1, first), sinks.number)
                near = torch.where(sinks.number == NOBODY, NOBODY, near)
                turned, keys = torch.cat([sinks.turned, turned], 1), torch.cat([near, keys], 1)
            by = [shift + n - at for n, at in ((number, place), (keys, turned))]
            by = [torch.where(n == NOBODY, 0, d) for n, d in zip((number, keys), by, strict=True)]
            self._cache[key] = (
                tuple(_table(d, turning, like) for d in by),
                turning,
            )  # keeps the object alive, so that its id stays unique
        found: tuple[Table | None, Table | None] = self._cache[key][0]
        return found

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store what a layer computed for the new columns; the last layer ends the call.

        Args:
            layer: index of the attention module.
            key: (batch, kv heads, columns, d), as the model rotated them.
            value: (batch, kv heads, columns, d_v).
        """
        if self._memory is None:
            return  # nothing is kept, or gradient checkpointing reruns the layers of a finished call
        if layer in self._written:
            raise AttnPatchError("an attention module ran twice in one forward; its memory is ambiguous.")
        order, width = self._kept()
        self._written[layer] = tuple(
            _taken(self.before.get(layer, (None, None))[i], t.detach(), order, width)
            for i, t in enumerate((key, value))
        )  # type: ignore[assignment]
        if self._sinks is not None:
            self._sunk[layer] = (self._sinks.states(layer, 0, key), self._sinks.states(layer, 1, value))
        if len(self._written) == self.layers:
            self._end(order, width)

    def _kept(self) -> tuple[Tensor | None, int]:
        """Return how many of the last columns are kept, and in which order if padding has to be removed."""
        if "kept" not in self._cache:
            count = self._count + self.tokens.keep.long().sum(1)
            width = int((self.segments.memory + count % self.segments.length).max())
            whole = bool(self.tokens.keep.all())
            order = None if whole else (self._numbers != NOBODY).to(torch.uint8).argsort(dim=1, stable=True)
            self._cache["kept"] = order, min(width, self._numbers.shape[1])
        found: tuple[Tensor | None, int] = self._cache["kept"]
        return found

    def _end(self, order: Tensor | None, width: int) -> None:
        assert self._memory is not None
        turned = torch.cat([self._turned, self.tokens.place], 1)
        number, turned = (_columns(t if order is None else t.gather(1, order), width) for t in (self._numbers, turned))
        count = self._count + self.tokens.keep.long().sum(1)
        shift = torch.where(self.tokens.keep, self.tokens.place - self.tokens.number, -(2**62)).amax(1)
        shift = torch.where(self.tokens.keep.any(1), shift, self._memory.shift)
        sinks = Sinks() if self._sinks is None else self._sinks.kept(self._sunk)
        self._memory.put(self._written, sinks, number, turned, count, shift, self.tokens.keep)
        self._memory, self._written = None, {}
        INSTEAD.set(None)


def _columns(states: Tensor, width: int) -> Tensor:
    """Return a copy of the last columns."""
    return states[:, states.shape[1] - width :].clone()


def _taken(before: Tensor | None, new: Tensor, order: Tensor | None, width: int) -> Tensor:
    """Return what is kept of the memory and the new columns, (batch, kv heads, width, d)."""
    if order is None:
        if before is None or new.shape[2] >= width:
            return new[:, :, new.shape[2] - width :].clone()
        return torch.cat([before[:, :, before.shape[2] + new.shape[2] - width :], new], 2)
    both = new if before is None else torch.cat([before, new], 2)
    index = _columns(order, width).to(both.device)[:, None, :, None]
    return both.gather(2, index.expand(-1, both.shape[1], -1, both.shape[3]))


def _table(by: Tensor, turning: RotaryPlanes, like: Tensor) -> Table | None:
    if not bool(by.any()):
        return None
    by = by[0] if bool((by == by[:1]).all()) else by
    return turning.table(by.to(like.device), like.dtype)


def _near(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Return which keys lie in the window of which queries: (batch, q), (batch, k) -> (batch, q, k), bool."""
    return query[..., None] - key[:, None] < window


def _wide(same: Tensor, width: int) -> Tensor:
    """Prepend columns of False up to a width."""
    return F.pad(same, (width - same.shape[-1], 0))


def no_weights(module: nn.Module) -> AttnPatchError:
    """Return the error that attention weights are not available."""
    return AttnPatchError(
        f"{type(module).__name__}: attention weights of a call that meets its memory are not returned; call "
        "without output_attentions, or with one segment."
    )
