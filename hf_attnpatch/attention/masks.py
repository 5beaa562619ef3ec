"""The attention mask of one forward: who sees whom, in whatever form a kernel or a wrapper asks for.

What queries see beside padding is mostly known from the module: everything before them, or everything. Then padding is
all that is written, in linear memory. Other masks (windows, packed documents, a chunk on top of a cache) are written
out, by transformers' own function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from ..errors import AttnPatchError
from ..functional.biased import UNSEEN, Sight, hiding
from ..functional.sinking import Tile
from ..upstream import words
from ..upstream.calls import BIDIRECTIONAL, CAUSAL, call_mask, sdpa_mask
from .call import AttentionCall

INSTEAD: ContextVar[Any] = ContextVar("hf_attnpatch_instead_of_masks", default=None)  # of a memory: hands its own out
TILE = 256  # queries of which a mask that is not plain is in memory at once, before it is cut to the keys that they see
_MEMORIES: list[None] = []  # one for each hook that may set it, which torch.compile can ask for; not the variable
_MADE_BY = "attnpatch_mask"  # attribute of what attention modules are handed: the mask that made it
_NEVER_NONE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
Form = TypeVar("Form")


def count_memory(hook: object) -> None:
    """Ask whether a memory hands out masks of its own for as long as this hook lives."""
    _MEMORIES.append(None)
    weakref.finalize(hook, _MEMORIES.pop)  # no line of ours: Python swallows a Ctrl-C there


class AttentionMask:
    """Who sees whom. Every form is made when first asked for, and kept for all layers of the forward.

    Args:
        kernel: by transformers' name.
        asked: what transformers gave the mask function, by its words.

    Attributes:
        told: what torch's kernels are told, where this package adds something: padding alone, or the whole mask; one
            True where that is not written.
    """

    def __init__(self, kernel: str, asked: Mapping[str, Any]):
        if not torch.compiler.is_compiling():  # a static cache counts on in the very tensor that it gives
            numbers = {n: int(v) for n, v in asked.items() if n in ("q_offset", "kv_offset") and isinstance(v, Tensor)}
            asked = {**asked, **numbers}
        self.kernel, self.asked = kernel, asked
        self.told: Tensor | None = None
        self._forms: dict[Hashable, Any] = {}

    def once(self, form: Hashable, make: Callable[[], Form]) -> Form:
        """Return a form that is made once; in a graph each time, as its sizes may be symbols."""
        if torch.compiler.is_compiling():
            return make()
        if form not in self._forms:
            self._forms[form] = make()
        found: Form = self._forms[form]
        return found

    def own(self) -> Any:
        """Transformers' own mask for torch's kernels; None where the kernel's own causality says it all."""
        return self.once("own", lambda: call_mask("sdpa", (), self.asked))

    def handed(self, written: bool = False) -> Any:
        """What attention modules are handed: a tensor, or what else the kernel takes, which knows this mask.

        Args:
            written: whether it is a plain tensor, also where that holds padding alone.
        """
        if self.kernel == "sdpa" and not self.plain and not written and not torch.compiler.is_compiling():
            self.told = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.asked.get("device", "cpu"))
            if type(self.told) is Tensor:  # windows, documents: some queries at a time, or whole if someone looks
                return Unwritten.of(self)
        made = _FORMS.get(self.kernel, _by_transformers)(self)
        if made is None:
            return made
        if torch.compiler.is_compiling():
            if isinstance(made, Tensor):
                made.attnpatch_mask = self  # type: ignore[attr-defined]  # setattr is not followed in a graph
            return made
        made = made.contiguous() if isinstance(made, Tensor) else made  # as generate asks for: a copy would not know
        if self.kernel == "sdpa":
            self.told = made
            if self.plain and not written and type(made) is Tensor:  # one without data is nobody's to look into
                return Unwritten.of(self)
        setattr(made, _MADE_BY, self)
        return made

    def whole(self) -> Tensor:
        """Which query sees which key, (batch, 1, q, k), bool."""
        found: Tensor = self.once("whole", lambda: sdpa_mask(**{**self.asked, **_NEVER_NONE}))
        return found

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the whole mask."""
        return self.asked["batch_size"], 1, self.asked["q_length"], self.asked["kv_length"]

    def positions(self) -> Tensor | None:
        """Position of each key, counted without padding, (batch or 1, k), int64, -1 where there is no key.

        The queries stand at the last of them. None where attention is not plainly causal.

        Raises:
            AttnPatchError: a row has padding between its tokens.
        """
        return self.once("positions", self._positions)

    @property
    def plain(self) -> bool:
        """Whether padding says it all: the rest follows from the module, or the one query sees every key there is."""
        function, queries = self.asked.get("mask_function", CAUSAL), self.asked["q_length"]
        if function is BIDIRECTIONAL:
            return True
        if function is not CAUSAL:
            return False
        return int(self.asked.get("q_offset", 0)) == (self.asked["kv_length"] - 1 if queries == 1 else 0)

    def padding(self) -> Tensor | None:
        """Which keys are there, (batch, 1, 1, k), where padding says it all; None if all are."""
        mask, keys, offset = (self.asked.get(name) for name in (words.ATTENTION_MASK, "kv_length", "kv_offset"))
        if mask is None:
            return None
        assert keys is not None
        first = offset or 0
        short = max(0, keys + first - mask.shape[-1])  # of a cache that is longer than the text
        keep = F.pad(mask, (0, short))[:, first : first + keys]
        causal = self.asked.get("mask_function", CAUSAL) is CAUSAL
        used = self.asked["q_length"] if causal and self.asked["q_length"] > 1 else keys
        return None if keep[:, :used].all() else keep[:, None, None]

    def tiles(self) -> tuple[Tile, ...]:
        """Who sees whom, some queries at a time, with the keys that any of them sees: linear memory for windows."""
        return self.once("tiles", lambda: tuple(self._tiles()))

    def _tiles(self) -> Iterator[Tile]:
        queries, keys = self.asked["q_length"], self.asked["kv_length"]
        if torch.compiler.is_compiling():
            yield Tile((0, queries), (0, keys), self.whole())
            return
        offsets = int(self.asked.get("q_offset", 0)), int(self.asked.get("kv_offset", 0))
        reach = self.asked.get("local_size")
        for start in range(0, queries, TILE):
            stop, low, high = min(start + TILE, queries), 0, keys
            if isinstance(reach, int):  # no farther than this, in either direction
                shift = offsets[0] - offsets[1]
                low, high = max(0, start + shift - reach), max(1, min(keys, stop + shift + reach))
            where = {"q_length": stop - start, "kv_length": high - low}
            offset = {"q_offset": offsets[0] + start, "kv_offset": offsets[1] + low}
            seen: Tensor = sdpa_mask(**{**self.asked, **_NEVER_NONE, **where, **offset})
            used = seen.flatten(0, -2).any(0).nonzero()
            first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            seen = seen[..., first:last].clone()
            yield Tile((start, stop), (low + first, low + last), None if bool(seen.all()) else seen)

    def _positions(self) -> Tensor | None:
        if self.asked.get("mask_function", CAUSAL) is not CAUSAL:
            return None
        if torch.compiler.is_compiling():
            return self._positions_in_a_graph()
        mask, device = self.asked.get(words.ATTENTION_MASK), self.asked.get("device", "cpu")
        keys, offset = self.asked["kv_length"], self.asked.get("kv_offset", 0)
        end, index = int(self.asked.get("q_offset", 0)) + self.asked["q_length"], torch.arange(keys, device=device)
        if offset:  # a cache that has let go of what came after its first keys
            index = torch.where(index < offset, index, index + end - keys)
        lead = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if mask is not None and not mask[:, :end].all():
            lead = _leads(mask[:, :end])
        places = index - lead
        return places.masked_fill((places < 0) | (index >= end), -1)

    def _positions_in_a_graph(self) -> Tensor:
        """As :meth:`positions`, by operations on tensors alone: padding between tokens is not looked for."""
        mask, device = self.asked.get(words.ATTENTION_MASK), self.asked.get("device", "cpu")
        keys, offset = self.asked["kv_length"], self.asked.get("kv_offset", 0)
        end, index = self.asked.get("q_offset", 0) + self.asked["q_length"], torch.arange(keys, device=device)
        index = torch.where(index < offset, index, index + end - keys) if offset else index
        lead = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if mask is not None:
            keep = mask.to(torch.bool) & (torch.arange(mask.shape[-1], device=device) < end)
            lead = torch.where(keep.any(-1, keepdim=True), keep.to(torch.uint8).argmax(-1, keepdim=True), end)
        places = index - lead
        return places.masked_fill((places < 0) | (index >= end), -1)


class Unwritten(Tensor):
    """A mask of which padding at most is in memory: the rest is written out if a module looks into it."""

    made: AttentionMask

    @classmethod
    def of(cls, made: AttentionMask, device: torch.device | None = None) -> Unwritten:
        """Return what stands for a mask, on its own device unless another is asked for."""
        assert made.told is not None
        found = made.told.to(device or made.told.device, copy=True).as_subclass(cls)
        found.made = made
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.detach):
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.to and isinstance(args[0], cls):
                asked = [*args[1:], *(kwargs or {}).values()]
                like = next((one for one in asked if isinstance(one, Tensor)), None)
                if {one for one in asked if isinstance(one, torch.dtype)} <= {torch.bool} and like is None:
                    here = next((torch.device(one) for one in asked if isinstance(one, _DEVICE)), args[0].device)
                    return args[0] if here == args[0].device else cls.of(args[0].made, here)
            form = _sized if func in _ABOUT else _whole
            return func(*map(form, args), **{name: form(value) for name, value in (kwargs or {}).items()})


_DEVICE = (torch.device, str)


def _whole(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole, value))
    return value.made.whole().to(value.device) if isinstance(value, Unwritten) else value


def _sized(value: Any) -> Any:
    if not isinstance(value, Unwritten):
        return value
    return torch.empty((), dtype=torch.bool, device=value.device).expand(value.made.shape)


_ABOUT = {  # functions that look at a tensor, and not into it
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.numel, Tensor.__len__),
}


def _leads(keep: Tensor) -> Tensor:
    """(batch, n), bool -> (batch, 1): how much padding each row begins with. What is behind a row's end is not seen."""
    steps = keep.to(torch.int8).diff(dim=-1)
    if bool((((steps == 1).sum(-1) + keep[:, 0]) > 1).any()):
        raise AttnPatchError(
            "attention_mask has padding between the tokens of a row; positions are counted here from the first token "
            "on: pad on the left, and generate for each conversation from its whole text."
        )
    first = keep.to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(keep.any(-1, keepdim=True), first, keep.shape[-1])


def _for_sdpa(mask: AttentionMask) -> Tensor:
    """One True where everything is seen, (1, 1, 1, 1), padding as (batch, 1, 1, k), or the whole mask; bool."""
    if torch.compiler.is_compiling() or not mask.plain:
        full: Tensor = sdpa_mask(**{**mask.asked, **_NEVER_NONE})
        return full
    found = mask.padding()
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask.asked.get("device", "cpu")) if found is None else found


def _for_flex(mask: AttentionMask) -> Any:
    """Flex attention's mask, which also says where the first query stands among the keys."""
    made = _by_transformers(mask)
    made.query_offset = mask.asked.get("q_offset", 0) - mask.asked.get("kv_offset", 0)
    return made


def _by_transformers(mask: AttentionMask) -> Any:
    """Transformers' own mask for the kernel; not kept, as it knows the mask that made it."""
    return call_mask("flash_attention_2" if mask.kernel.startswith("flash") else mask.kernel, (), mask.asked)


_FORMS: Mapping[str, Callable[[AttentionMask], Any]] = {"sdpa": _for_sdpa, "flex_attention": _for_flex}


@functools.cache
def mask_function(kernel: str, written: bool = False) -> Callable[..., Any]:
    """Return the mask function of a kernel: always the same; ``written`` as in :meth:`AttentionMask.handed`."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        made = AttentionMask(kernel, {**dict(zip(words.MASKS, args, strict=False)), **kwargs})
        memory = INSTEAD.get() if _MEMORIES else None
        if memory is not None and memory.asked_by(kwargs.get("config")):
            return memory.handed(made, written)
        return made.handed(written)

    return mask


class MemoryMask:
    """What attention modules are handed in the place of a mask, by a memory.

    Args:
        call: the forward in progress, which is ``plain`` where the model computes what it would without a memory.
        own: the kernel's own mask, which holds where the forward is plain.
    """

    def __init__(self, call: Any, own: Any = None):
        self.call, self.own = call, own

    def to(self, *args: Any, **kwargs: Any) -> MemoryMask:
        """As the kernel's own mask is cast; MPT wants it to be bool."""
        return MemoryMask(self.call, None if self.own is None else self.own.to(*args, **kwargs))


def mask_of(handed: Any) -> AttentionMask | None:
    """Return the mask that made what a module was handed; None for a caller's own, or one that a module changed."""
    return handed.made if isinstance(handed, (Sight, Unwritten)) else getattr(handed, _MADE_BY, None)


def own_mask(call: AttentionCall) -> Any:
    """Return the mask of a call as its kernel takes it by itself: for a module that adds nothing to the scores."""
    mask = call.mask
    if call.kernel != "sdpa" or mask is None:
        return mask
    made = mask_of(mask)
    if made is not None:
        own = made.own()
        return own if own is None else own.to(call.query.device)
    if mask.dtype != torch.bool:  # ours are bool: this one is added, as the module or its caller wrote it
        return mask
    if mask.numel() == 1:
        mask = None
    if not call.causal or call.query.shape[2] == 1 or (mask is not None and mask.shape[-2] != 1):
        return mask
    here = torch.arange(call.query.shape[2], device=call.query.device)[:, None]
    seen = torch.arange(call.key.shape[2], device=call.query.device) <= here
    return seen[None, None] if mask is None else mask & seen


def tiles_of(call: AttentionCall) -> tuple[Tile, ...]:
    """Return who sees whom in a call to torch's kernels, in parts of few queries where padding does not say it all."""
    made, queries, keys = mask_of(call.mask), call.query.shape[2], call.key.shape[2]
    if isinstance(call.mask, Sight):
        made = None
    if made is not None and not made.plain and made.kernel == "sdpa" and made.asked["kv_length"] == keys:
        device = call.query.device
        return made.once(
            ("tiles", device),
            lambda: tuple(Tile(t.rows, t.columns, None if t.seen is None else t.seen.to(device)) for t in made.tiles()),
        )
    mask = call.mask.mask if isinstance(call.mask, Sight) else _told(call.mask)
    mask = None if mask is None or mask.numel() == 1 else mask
    causal = call.causal and queries > 1 and (mask is None or mask.shape[-2] == 1)
    if mask is not None:
        mask = hiding(mask[..., :keys]).to(call.query.device)
    if not causal or keys == queries:
        return (Tile((0, queries), (0, keys), mask, causal),)
    # a prefill into a cache of fixed length, the rest of which is empty
    return (Tile((0, queries), (0, queries), None if mask is None else mask[..., :queries], True),)


def says_nothing(mask: Any) -> bool:
    """Whether a mask hides nothing beside what the module hides by itself."""
    if isinstance(mask, Unwritten) and not mask.made.plain:  # not written out to be asked
        return False
    mask = _told(mask)
    return mask is None or (isinstance(mask, Tensor) and mask.numel() == 1)


def _told(mask: Any) -> Any:
    """Return what a mask that is not written tells: padding alone, or all of it where that does not say it all."""
    if not isinstance(mask, Unwritten):
        return mask
    told = mask.made.told if mask.made.plain else mask.made.whole()
    assert told is not None
    return told.to(mask.device)


def read_sight(handed: Tensor | Sight | None, causal: bool, queries: int, keys: int) -> Sight:
    """Return what a query sees by what modules are handed, or by a user's mask of four dimensions.

    Raises:
        AttnPatchError: a causal module is told to look ahead.
    """
    if isinstance(handed, Sight):
        return handed
    mask: Tensor | None = _told(handed)
    if mask is None or mask.numel() == 1:
        return Sight(causal)
    if mask.shape[-2] == 1 and mask.dtype == torch.bool and mask.shape[1] == 1:
        return Sight(causal, mask[:, 0, 0])
    mask = hiding(mask[..., :keys])
    if causal and not torch.compiler.is_compiling():
        _check_causal(mask, queries, keys)
    return Sight(causal, mask=mask)


def _check_causal(mask: Tensor, queries: int, keys: int) -> None:
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > UNSEEN
    last = torch.where(visible.any(-1), keys - 1 - visible.flip(-1).to(torch.uint8).argmax(-1), -1)
    steps, counts = last.diff(dim=-1), (last[:, 1:] >= 0) & (last[:, :-1] >= 0)
    stays = (steps == 0) & counts  # of padding behind a text; of a prefix, which looks ahead, before it
    after = stays.cumsum(-1) > 0
    begins = stays[:, :1].any() and bool((stays[:, 0] & (last[:, 0] != keys - queries)).any())
    if begins or bool((counts & ~stays & ((steps != 1) | after)).any()):
        raise AttnPatchError(
            f"attention mask of shape {tuple(mask.shape)}: some of its {queries} queries see tokens after them (image "
            "blocks, a prefix) or not themselves; distance is defined here for tokens that look back only."
        )
