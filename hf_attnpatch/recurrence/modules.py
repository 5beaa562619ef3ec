"""The hook on the decoder of a model with segment recurrence."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..attention.masks import INSTEAD, count_memory
from ..attention.registry import FUSED, PREFIX, keep_wrappers
from ..errors import AttnPatchError
from ..functional.segments import NOBODY, Segments
from ..upstream import words
from ..upstream.caches import length as cached
from ..upstream.roles import Arguments, Roles
from .call import Call, Tokens, no_weights
from .memory import Memory, RecurrentCache

OURS = (PREFIX, FUSED)  # prefixes of the implementations whose masks this package makes


class MemoryHook:
    """Forward pre-hook of a decoder: passes the memory to its attention modules, and positions to its tokens.

    Args:
        roles: argument roles of the decoder's forward.
        config: the config whose attention implementation the decoder reads.
        segments: how rows are cut into segments.
        bounded: whether positions restart in each segment; otherwise they continue.
        layers: number of attention modules that run in a forward.
        rows: rows of the position table, None if there is none.
        native: whether attention modules compute their own scores, so that no other kernel can be selected.
    """

    def __init__(
        self,
        roles: Roles,
        config: Any,
        segments: Segments,
        bounded: bool,
        layers: int,
        rows: int | None,
        native: bool = False,
    ):
        self.roles, self.config, self.segments, self.native = roles, config, segments, native
        self.bounded, self.layers, self.rows = bounded, layers, rows
        self._open: dict[int, Memory] = {}  # thread id -> its memory
        count_memory(self)

    @property
    def stream(self) -> Memory | None:
        """The memory of this thread's open stream, or None."""
        return self._open.get(threading.get_ident())

    @property
    def is_open(self) -> bool:
        """Whether any thread has a stream open on the model."""
        return bool(self._open)

    def open(self, memory: Memory) -> None:
        """Carry this memory across the calls of this thread."""
        self._open[threading.get_ident()] = memory

    def close(self, memory: Memory) -> None:
        """Stop carrying it, whichever thread opened it."""
        for thread in [thread for thread, found in list(self._open.items()) if found is memory]:
            self._open.pop(thread, None)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a saved model, which has no open stream."""
        return {**vars(self), "_open": {}}

    @property
    def gave_positions(self) -> bool:
        """Whether the positions of the current forward may come from this hook instead of the caller."""
        call = INSTEAD.get()
        return isinstance(call, Call) and not call.plain

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryHook:
        """Return a copy without open streams."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        vars(self).update(state)
        count_memory(self)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the new tokens, and pass on the memory that they attend to."""
        INSTEAD.set(None)
        self._check(module)
        named = self.roles.bind(args, kwargs)
        given = named.get(words.TOKENS)
        given = named.get(words.EMBEDDINGS) if given is None else given
        if given is None:
            return args, dict(kwargs)  # the forward raises
        memory = self._memory(module, named)
        kept = memory is not None
        memory = Memory() if memory is None else memory
        memory.begin(given.shape[0])
        tokens, same = self._tokens(named, given.shape[0], given.shape[1], memory)
        call = Call(self.segments, tokens, memory, self.layers, functools.partial(self._asks, weakref.ref(module)))
        if named.get(words.WEIGHTS) and not call.plain:
            raise no_weights(module)
        if not kept:
            call.forget()
        if not (call.plain and same):
            self._check_rows(tokens)
            if self.roles.takes(words.POSITIONS):
                named.put(words.POSITIONS, tokens.place.clamp(min=0).to(given.device))
        INSTEAD.set(call)
        return named.back()

    def _asks(self, decoder: weakref.ref[nn.Module], config: Any) -> bool:
        """Return whether a mask request with this config comes from a decoder that still has this hook."""
        module = decoder()
        return (config is None or config is self.config) and module is not None and recalling_of(module) is self

    def _check(self, module: nn.Module) -> None:
        if not self.native:
            keep_wrappers(self.config)
        found = self.config._attn_implementation
        if not found.startswith(OURS):
            raise AttnPatchError(
                f"{type(module).__name__}: attention implementation {found!r} would drop this model's memory; "
                f"model.set_attn_implementation('{PREFIX}{found}') keeps it."
            )

    def _memory(self, module: nn.Module, named: Arguments) -> Memory | None:
        """Return the memory that the call reads and writes, and replace the cache by a view of it."""
        past = named.get(words.CACHE)
        if self._open and self.stream is None and not isinstance(past, RecurrentCache):
            raise AttnPatchError(
                f"{type(module).__name__}: another thread has a stream open on this model; a stream belongs to the "
                "thread that opened it. Open one here, too, which has a memory of its own "
                "(`with hf_attnpatch.stream(model): ...`), or run a copy of the model."
            )
        if isinstance(past, RecurrentCache):
            named.put(words.CACHE, past)
            if self.stream is not None and past.memory is not self.stream:
                raise AttnPatchError("the cache comes from outside of the open stream; pass it after the stream.")
            return past.memory
        if past is not None and (type(past) is not DynamicCache or cached(past)):
            size = f" of {cached(past)} tokens" if isinstance(past, Cache) else ""
            raise AttnPatchError(
                f"the cache is a {type(past).__name__}{size}; a model with segment recurrence makes its own "
                "cache, of constant size: pass none, or the one that it returned."
            )
        wanted = named.get(words.USE_CACHE)
        wanted = getattr(self.config, self.roles.names.get(words.USE_CACHE, ""), True) if wanted is None else wanted
        checkpointing = getattr(module, "gradient_checkpointing", False) and module.training
        if checkpointing or not (wanted or past is not None):
            named.put(words.CACHE, None)
            return self.stream
        memory = Memory() if self.stream is None else self.stream
        if past is not None:  # its holder fills, crops, resets and reorders the memory from now on
            RecurrentCache.take_over(past, memory, self.segments)
        named.put(words.CACHE, RecurrentCache(memory, self.segments) if past is None else past)
        return memory

    def _tokens(self, named: Arguments, batch: int, columns: int, memory: Memory) -> tuple[Tokens, bool]:
        """Return the new columns, and whether their positions are the decoder's default ones."""
        mask, given = named.get(words.MASK), named.get(words.POSITIONS)
        _check_shapes(mask, given, batch, columns)
        keep = torch.ones(batch, columns, dtype=torch.bool)
        if mask is not None:
            keep = mask[:, -columns:].bool().cpu()
        number = memory.count[:, None] + keep.long().cumsum(1) - 1
        _check_gaps(keep, memory.count)
        plain = memory.empty and columns <= self.segments.length
        on = number + memory.shift[:, None]
        whole = not plain or self.bounded or not self._keeps(named) or bool(keep.all())
        if given is not None:
            place = given.cpu().long().expand(batch, -1)
            _check_packed(place, keep, plain and not self._keeps(named))
            place = torch.where((memory.count > 0)[:, None], on, place)  # generate counts its own tokens only
        elif plain and whole:
            place = torch.arange(columns).expand(batch, -1)
        else:
            place = on
        if self.bounded and not plain:
            place = number - self.segments.start(number)
        return Tokens(keep, torch.where(keep, number, NOBODY), place), plain and whole

    def _keeps(self, named: Arguments) -> bool:
        return self.stream is not None or named.get(words.CACHE) is not None

    def _check_rows(self, tokens: Tokens) -> None:
        last = int(tokens.place.max())
        if self.rows is not None and last >= self.rows:
            raise AttnPatchError(
                f"position {last} was reached and the model's table has {self.rows}; positions='bounded' begin anew "
                "with each segment."
            )


def _check_shapes(mask: Any, given: Any, batch: int, columns: int) -> None:
    """Refuse a mask or positions that do not match these tokens."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise AttnPatchError(f"attention_mask {found}: a memory takes (batch, tokens) only.")
    if mask is not None and (mask.shape[0] != batch or mask.shape[1] < columns):
        raise AttnPatchError(
            f"attention_mask of shape {tuple(mask.shape)} for {batch} rows of {columns} tokens; wanted one for each "
            "token, and for those before it if they are named."
        )
    if given is not None and (given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != columns):
        raise AttnPatchError(
            f"position_ids of shape {tuple(given.shape)} for {batch} rows of {columns} tokens: give each token its own."
        )


def _check_gaps(keep: Tensor, count: Tensor) -> None:
    """Refuse padding between the tokens of a row; it may only precede or follow a document."""
    rises = keep.long().diff(dim=1, prepend=(count > 0).long()[:, None]) > 0
    bad = rises.sum(1) > (count == 0).long()
    if bool(bad.any()):
        row = int(bad.to(torch.uint8).argmax())
        raise AttnPatchError(
            f"row {row}: padding between tokens of one document; pad on the right in a stream, or reset([{row}]) where "
            "another document begins."
        )


def _check_packed(place: Tensor, keep: Tensor, allowed: bool) -> None:
    steps = place.diff(dim=1) != 1
    if not allowed and bool((steps & keep[:, 1:] & keep[:, :-1]).any()):
        raise AttnPatchError(
            "position_ids that do not count up (packed documents, images): a memory takes one document a row; give "
            "each its row, and reset(rows) where another begins."
        )


def recalling_of(module: nn.Module) -> MemoryHook | None:
    """Return the hook that gives a decoder its memory, or None."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, MemoryHook)), None)
