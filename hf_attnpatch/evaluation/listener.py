"""Records torch's operations while a model runs on tensors with shapes and no data."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .kinds import kind_of, matmul_shape
from .memory import held_tensors

_NOTED = 2**16  # bytes; smaller tensors are too many and weigh nothing
PARTS = ("weights", "cache", "attention", "rest")


@dataclass(frozen=True)
class Operation:
    """One call of torch.

    Attributes:
        name: as torch calls it, without namespace and overload.
        kind: ``matmul``, ``attention``, ``attention_backward``, ``view`` or what limits its loop: see ``kinds.py``.
        part: which of :data:`PARTS` it belongs to.
        dtype: of what it writes, such as ``float32``.
        flops: multiplications and additions.
        reads: for each tensor read, its bytes and how many bytes the model touched since it was last touched; where it
            was not touched before, as many as the whole pass touches.
        written: bytes written.
        allocated: bytes of each tensor that is new and larger than a memory page or two.
        freed: the same of those that were let go since the operation before.
        size: what its rate depends on: rows, inner, columns of a product; queries, keys, head_dim, group, causal.
    """

    name: str
    kind: str
    part: str
    dtype: str
    flops: int
    reads: tuple[tuple[int, int], ...]
    written: int
    allocated: tuple[int, ...]
    freed: tuple[int, ...]
    size: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Pass:
    """One forward, or forward and backward.

    Attributes:
        operations: in order.
        peak_bytes: most memory held at once beyond the weights: the cache, activations, gradients.
        cache_bytes: of keys and values afterwards; 0 where nothing is cached.
    """

    operations: tuple[Operation, ...]
    peak_bytes: int
    cache_bytes: int


class Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's base is not typed
    """Records operations, and how much memory live tensors hold."""

    def __init__(self, model: nn.Module, queries: int, keys: int, cache: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.queries, self.keys, self.cache = queries, keys, cache
        self.parameters = WeakIdKeyDictionary()
        for parameter in model.parameters():
            self.parameters[parameter.untyped_storage()] = True
        self.touched = 0  # bytes so far
        self.last = WeakIdKeyDictionary()  # storage -> bytes touched when it was last touched
        self.alive = self.peak = 0  # bytes of the cache, and of storages that are new in this pass
        for tensor in held_tensors(cache) if cache is not None else ():
            self._hold(tensor.untyped_storage())
        self.freed: list[int] = []  # sizes of what was let go since the last operation
        self.operations: list[Operation] = []

    def done(self, cache_bytes: int) -> Pass:
        """Return the records; tensors that had not been touched before count as touched one pass ago."""
        whole = [
            replace(op, reads=tuple((size, self.touched if age < 0 else age) for size, age in op.reads))
            for op in self.operations
        ]
        return Pass(tuple(whole), self.peak, cache_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes and record it."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return _assumed(args[0], self.keys)
        grouped = func is torch.ops.aten._grouped_mm.default  # torch's own rule of shapes for it knows bfloat16 only
        out = _grouped(args[0], args[1], [*args[2:3], kwargs.get("offs")][0]) if grouped else func(*args, **kwargs)
        if func.namespace != "prim":
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        storages = {id(t.untyped_storage()) for t in given}
        new = [t for t in made if id(t.untyped_storage()) not in storages]
        kind = kind_of(name, in_place=bool(made) and not new, view=func.is_view)
        flops, size = matmul_shape(name, kind, given, args, kwargs)
        reads, written = self._traffic(name, kind, given, made)
        part = self._part(name, kind, given, made)
        dtype = str(made[0].dtype).removeprefix("torch.") if made else ""
        fresh = list({id(s): s for s in (t.untyped_storage() for t in new)}.values())
        sizes = tuple(s.nbytes() for s in fresh if s.nbytes() >= _NOTED)
        freed, self.freed = tuple(self.freed), []
        self.operations.append(Operation(name, kind, part, dtype, flops, reads, written, sizes, freed, size))
        for storage in fresh:
            self._hold(storage)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.alive -= size
        if size >= _NOTED:
            self.freed.append(size)

    def _traffic(
        self, name: str, kind: str, given: list[Tensor], made: list[Tensor]
    ) -> tuple[tuple[tuple[int, int], ...], int]:
        """Return bytes read, with how long ago each was last touched, and bytes written."""
        if kind == "view":
            return (), 0
        written = sum(_bytes(t) for t in made)
        if name.startswith(("index_copy", "index_put", "scatter")):  # writes what it is given, not all that it returns
            written = min(written, 2 * min((_bytes(t) for t in given), default=0))
        reads = []
        for tensor in given:
            storage = tensor.untyped_storage()
            size = min(_bytes(tensor), storage.nbytes())
            if name.startswith(("embedding", "index", "gather")):  # reads the rows that it returns
                size = min(size, written)
            if name == "_grouped_mm" and tensor.dim() == 3:  # reads one expert a token, at most all
                size = size * min(len(given[0]), len(tensor)) // len(tensor)
            reads.append((size, self.touched - self.last[storage] if storage in self.last else -1))
        self.touched += sum(size for size, _ in reads) + written
        for tensor in (*given, *made):
            self.last[tensor.untyped_storage()] = self.touched
        return tuple(reads), written

    def _part(self, name: str, kind: str, given: list[Tensor], made: list[Tensor]) -> str:
        if self.cache is not None and self.cache.updating:
            return "cache"
        weighs = any(t.untyped_storage() in self.parameters for t in given)
        if kind.startswith("attention"):
            return "attention"
        if kind == "matmul":
            return "weights" if weighs or name in ("mm", "addmm") else "attention"
        if name.startswith("embedding"):
            return "weights"
        shapes = [t.shape for t in (*given, *made) if t.dim() >= 3]
        if self.keys > 1 and any(tuple(s[-2:]) == (self.queries, self.keys) for s in shapes):
            return "attention"  # scores and masks
        if self.queries == 1 < self.keys and any(self.keys in s[-3:-1] for s in shapes):
            return "cache"  # repeats or copies keys and values
        repeated = any(len(s) == 5 and s[-2] == self.keys for s in shapes)
        return "attention" if repeated and kind == "copy" else "rest"


def _assumed(tensor: Tensor, keys: int) -> bool | int | float:
    """Return the value for a model that asks for one: True, or the length of the context."""
    if tensor.dtype is torch.bool:
        return True
    return float(keys) if tensor.is_floating_point() else keys


def _grouped(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return the shape of a grouped product, with one matrix for each group or for each row."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offsets), left.shape[0], right.shape[1])


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
