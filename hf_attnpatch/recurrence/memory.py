"""The memory of segment recurrence: keys and values of the last segments, by layer and row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..errors import AttnPatchError
from ..functional.segments import NOBODY, Segments
from ..upstream.caches import DynamicLayer, overriding, queries
from .sinks import Layers, Sinks, named_layers, selected


class Memory:
    """The memory of one stream of batches, of constant size; gradients stop here.

    Attributes:
        layers: index of the attention module -> keys and values, each (batch, kv heads, held, d).
        sinks: the first tokens of each row, which are kept for good.
        number: token numbers of the held columns, (batch, held), int64, on the CPU; -1 for none.
        turned: position for which each key was rotated, (batch, held), int64, on the CPU.
        count: tokens that each row has read, (batch,), int64, on the CPU.
        shift: position minus token number, (batch,), int64, on the CPU.
        columns: columns read, including padding.
        whole: how many of the last columns are tokens in every row.
    """

    def __init__(self) -> None:
        self.layers: Layers = {}
        self.number = self.turned = torch.zeros(0, 0, dtype=torch.int64)
        self.count = self.shift = torch.zeros(0, dtype=torch.int64)
        self.sinks = Sinks()
        self.columns = self.whole = 0

    @property
    def empty(self) -> bool:
        """Whether no row has read anything."""
        return not bool(self.count.any())

    def begin(self, batch: int) -> None:
        """Allocate rows for a batch.

        Raises:
            AttnPatchError: the number of rows differs from before.
        """
        if not len(self.count):
            self.number = self.turned = torch.zeros(batch, 0, dtype=torch.int64)
            self.count = self.shift = torch.zeros(batch, dtype=torch.int64)
        if len(self.count) != batch:
            raise AttnPatchError(
                f"a stream of {len(self.count)} rows was given a batch of {batch}: row r goes on where row r stopped, "
                "so that there must be as many; open another stream, or reset() this one without rows."
            )

    def put(
        self, layers: Layers, sinks: Sinks, number: Tensor, turned: Tensor, count: Tensor, shift: Tensor, keep: Tensor
    ) -> None:
        """Replace the memory at once; ``keep`` marks the columns of the call that are no padding."""
        self.layers, self.sinks = layers, sinks
        self.number, self.turned, self.count, self.shift = number, turned, count, shift
        whole = int(keep.all(0).flip(0).long().cumprod(0).sum())
        self.whole = whole + (self.whole if whole == keep.shape[1] else 0)
        self.columns += keep.shape[1]

    def crop(self, columns: int, segments: Segments) -> None:
        """Remove the last columns.

        Args:
            columns: how many.
            segments: how rows are cut.

        Raises:
            AttnPatchError: the memory no longer holds what the next token would see, or some columns are padding.
        """
        count = self.count - columns
        if columns > self.whole or bool((count < 0).any()):
            raise AttnPatchError(
                f"the last {columns} columns of the cache are not all tokens of every row; only tokens can be taken "
                "back: crop before the padding, or reset() the cache and read the text again."
            )
        oldest = torch.where(self.number == NOBODY, self.count[:, None], self.number).amin(1)
        lost = (count > 0) & (oldest > segments.oldest(count))
        if bool(lost.any()):
            raise AttnPatchError(
                f"a recurrent memory cannot be rolled back by {columns} tokens (assisted decoding, a dropped draft, "
                "crop): it would go back into an earlier segment, and what that saw has left the memory; decode "
                "without an assistant, or reset() the cache and read the text again."
            )
        width = max(0, self.number.shape[1] - columns)
        self.layers = {n: (k[:, :, :width], v[:, :, :width]) for n, (k, v) in self.layers.items()}
        self.number, self.turned, self.count = self.number[:, :width], self.turned[:, :width], count
        self.shift = torch.where(count > 0, self.shift, 0)
        self.sinks = self.sinks.before(count)
        self.columns, self.whole = self.columns - columns, self.whole - columns

    def reset(self, rows: Iterable[int] | Tensor | None = None) -> None:
        """Clear some rows, or everything including the number of rows.

        Args:
            rows: indices, or bool of shape (batch,); None for all.

        Raises:
            AttnPatchError: there is no such row.
        """
        if rows is None:
            read = self.columns
            self.__init__()  # type: ignore[misc]  # the same object: a cache and a stream may both hold it
            self.columns = read
            return
        chosen = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).cpu()
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.to(torch.int64)
        if not len(self.count) or not len(chosen):
            return  # nothing has been read yet
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self.count):
            raise AttnPatchError(
                f"rows {chosen.tolist()} cannot be reset: the stream has rows 0 to {len(self.count) - 1}."
            )
        self.number, self.count, self.shift = self.number.clone(), self.count.clone(), self.shift.clone()
        self.number[chosen], self.count[chosen], self.shift[chosen] = NOBODY, 0, 0
        self.sinks = self.sinks.without(chosen)

    def select(self, rows: Tensor) -> None:
        """Select rows in this order; a row may occur several times."""
        here = rows.cpu()
        self.layers, self.sinks = selected(self.layers, rows), self.sinks.select(rows)
        self.number, self.turned = self.number[here], self.turned[here]
        self.count, self.shift = self.count[here], self.shift[here]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the memory as named tensors, for a checkpoint."""
        pairs = {f"{n}.{name}": t for n, pair in self.layers.items() for name, t in zip("kv", pair, strict=True)}
        own = {name: getattr(self, name) for name in ("number", "turned", "count", "shift")}
        return {**pairs, **own, **self.sinks.state_dict(), "columns": torch.tensor(self.columns)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict`; tensors stay on their device."""
        self.layers, self.sinks = named_layers(state), Sinks.of(state)
        self.number, self.turned = state["number"].cpu(), state["turned"].cpu()
        self.count, self.shift, self.columns = state["count"].cpu(), state["shift"].cpu(), int(state["columns"])
        self.whole = 0  # the state does not tell which of its last columns are padding


@overriding("SegmentRecurrence", "get_mask_sizes")
class RecurrentCache(Cache):  # type: ignore[misc]  # transformers is not followed
    """The cache that ``generate`` and manual decoding hold: a view of a :class:`Memory`.

    Attention modules bypass it: their wrapper reads and writes the memory.

    Args:
        memory: the stream's memory.
        segments: how rows are cut into segments.
    """

    passed_by = True

    def __init__(self, memory: Memory, segments: Segments):
        self.memory, self.segments, self.begun = memory, segments, memory.columns
        self.offloading, self.layer_class_to_replicate = False, None

    @classmethod
    def take_over(cls, cache: Cache, memory: Memory, segments: Segments) -> None:
        """Turn an empty cache that the caller holds into a view of a memory."""
        vars(cache).clear()
        cache.__class__ = cls
        cls.__init__(cache, memory, segments)

    @property
    def layers(self) -> list[DynamicLayer]:
        """The held keys and values in transformers' form, for code that counts bytes."""
        found = []
        for number, pair in self.memory.layers.items():
            keys, values = (torch.cat([t, *more], 2) for t, *more in zip(*self._parts(number, pair), strict=True))
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            found.append(layer)
        return found

    def _parts(self, number: int, pair: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        sinks = self.memory.sinks.layers.get(number)
        return [pair] if sinks is None else [sinks, pair]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the new states; the wrapper adds the rest."""
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return the number of columns read since the cache was made."""
        return self.memory.columns - self.begun

    def get_max_length(self, *_: Any, **__: Any) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: Any, *_: Any, **__: Any) -> tuple[int, int]:
        """Return the size of the mask of the new columns."""
        return queries(query_length), 0

    @property
    def is_compileable(self) -> bool:
        """False: the shapes change."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return not self.memory.empty

    @property
    def is_croppable(self) -> bool:
        """False: columns that left the memory are lost."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.memory.reset()
        self.begun = self.memory.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows."""
        self.memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.memory.select(torch.arange(len(self.memory.count)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: the negative number to remove; if positive, as before transformers 5.24, the number to
                keep.

        Raises:
            AttnPatchError: the tokens before them have left the memory already.
        """
        read = self.get_seq_length()
        columns = -tokens_to_remove if tokens_to_remove <= 0 else max(0, read - tokens_to_remove)
        if columns > read:
            raise AttnPatchError(f"{columns} tokens cannot be taken back from a cache that has read {read}.")
        if columns:
            self.memory.crop(columns, self.segments)
