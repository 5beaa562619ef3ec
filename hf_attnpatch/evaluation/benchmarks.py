"""Measures the rates of a machine, each at the size where it is needed and in isolation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import LlamaConfig, LlamaForCausalLM

from ..upstream import words
from ..upstream.caches import returned
from ..upstream.roles import run
from .listener import Pass
from .machine import MIB, Point
from .operations import Phantom
from .timing import WARM_UP, clock, median, typical

Size = tuple[tuple[str, int], ...]

_CONTEXT, _STEPS = 64, 60  # of the reference models
_BLOCK = 4 * MIB  # of a working set that is walked through
_LOOPS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "copy": Tensor.clone,
    "pointwise": lambda x: x * 2.0,
    "reduce": lambda x: x.mean(-1),
    "softmax": lambda x: x.softmax(-1),
    "silu": F.silu,
    "gelu": F.gelu,
    "exp": torch.exp,
}


def measured(kind: str, dtype: str, size: Size, device: torch.device) -> Point:
    """Measure one point.

    Args:
        kind: as in :class:`Point`.
        dtype: such as ``float32``.
        size: as :func:`hf_attnpatch.evaluation.machine.needs` wants it.
        device: where.
    """
    kinds: Mapping[str, Callable[..., float]] = {
        **{"matmul": _product, "attention": _attention, "attention_backward": _attention_backward},
        **dict.fromkeys(_LOOPS, lambda sizes, dtype, device: _loop(kind, sizes, dtype, device)),
    }
    return Point(kind, dtype, size, kinds[kind](dict(size), getattr(torch, dtype), device))


@dataclass(frozen=True)
class Reference:
    """A decoding step of a small random model: what it computes, and the seconds that it was seen to take."""

    step: Pass
    seconds: float


def references(device: torch.device) -> tuple[Reference, Reference]:
    """Return the decoding steps of two Llamas that differ in their number of layers only.

    What they take beyond their loops is dispatch and Python. Their weights are no model's, and as large as it takes to
    push the code and the data of one operation out of the fast caches before the next, as happens in any real model.
    """
    return _reference(2, device), _reference(8, device)


def _reference(layers: int, device: torch.device) -> Reference:
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)).to(device).eval()
    return Reference(Phantom(model).decode(1, _CONTEXT)[1], _step_seconds(model, device))


@torch.no_grad()
def _step_seconds(model: LlamaForCausalLM, device: torch.device) -> float:
    context = torch.zeros(1, _CONTEXT, dtype=torch.long, device=device)
    cache: Any = next(iter(returned(run(model, {words.TOKENS: context, words.USE_CACHE: True})).values()), None)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    found = []
    for index in range(_STEPS):
        begin = clock()
        run(model, {words.TOKENS: token, words.CACHE: cache, words.USE_CACHE: True}, logits_to_keep=1)
        found += [clock() - begin] * (index >= WARM_UP)
        cache.crop(-1)
    return median(found)


def fresh(device: torch.device) -> tuple[int, float]:
    """Return from which size on a tensor comes from the system, in bytes, and seconds of each byte of such pages.

    glibc keeps what is freed below its largest threshold, 32 MiB, and maps larger ones anew, a page fault at a time.
    """
    if device.type != "cpu":
        return 0, 0.0
    size, fewer = 40 * MIB, 31 * MIB  # freeing the smaller one also settles glibc's moving thresholds
    buffer, small = torch.ones(size // 4), torch.ones(fewer // 4)
    anew = typical(lambda: torch.empty_like(buffer).fill_(1.0), repeats=5) / size
    again = typical(lambda: torch.empty_like(small).fill_(1.0), repeats=5) / fewer
    return 32 * MIB, max(anew - again, 0.0)


def _blocks(size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    block = min(_BLOCK, size)
    rows = max(block // (1024 * dtype.itemsize), 1)
    return [torch.rand(rows, 1024, device=device).to(dtype) for _ in range(max(size // block, 1))]


@torch.no_grad()
def _loop(kind: str, size: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> float:
    run, blocks = _LOOPS[kind], _blocks(size["set"], dtype, device)
    read = blocks[0].nbytes
    moved = read if kind == "reduce" else 2 * read
    return _rate(moved, run, [(block,) for block in blocks])


@torch.no_grad()
def _product(size: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, columns, batch = (size[name] for name in ("rows", "inner", "columns", "batch"))
    left = torch.randn(batch, rows, inner, device=device).to(dtype)
    own = batch * inner * columns * dtype.itemsize
    weights = [torch.randn(batch, columns, inner, device=device).to(dtype) for _ in range(max(size["set"] // own, 1))]
    pairs: list[tuple[Tensor, ...]] = [(left, w.transpose(1, 2)) for w in weights]
    pairs = pairs if batch > 1 else [(a[0], b[0]) for a, b in pairs]
    return _rate(2 * batch * rows * inner * columns, torch.matmul, pairs)


def _heads(size: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    queries, keys, dim, group = (size[name] for name in ("queries", "keys", "head_dim", "group"))
    heads = size["heads"]
    own = 2 * heads * keys * dim * dtype.itemsize
    for _ in range(max(size["set"] // own, 1)):
        # as a model has them: queries of a token side by side, keys and values of a head
        q = torch.randn(1, queries, heads * group, dim, device=device).to(dtype).transpose(1, 2)
        yield q, *(torch.randn(1, heads, keys, dim, device=device).to(dtype) for _ in range(2))


def _flops(size: Mapping[str, int], products: int) -> int:
    whole = size["heads"] * size["group"] * size["queries"] * size["keys"] * 2 * size["head_dim"]
    return products * whole // (1 + size["causal"])


@torch.no_grad()
def _attention(size: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> float:
    causal, grouped = bool(size["causal"]), size["group"] > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return _rate(_flops(size, 2), attend, list(_heads(size, dtype, device)))


def _attention_backward(size: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> float:
    ((q, k, v),) = list(_heads({**size, "set": 0}, dtype, device))
    k, v = (x.repeat_interleave(size["group"], 1) for x in (k, v))
    for each in (q, k, v):
        each.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(size["causal"]))
    ones = torch.ones_like(out)
    return _rate(_flops(size, 5), lambda: torch.autograd.grad(out, (q, k, v), ones, retain_graph=True), [()])


def _rate(amount: int, run: Callable[..., object], inputs: Sequence[tuple[Tensor, ...]]) -> float:
    """Return amount per second of a call, on one input after the other so that each has left the caches meanwhile."""
    if len(inputs) * amount > 1e9:  # a call is long enough to be timed by itself
        turns = cycle(inputs)
        return amount / typical(lambda: run(*next(turns)))

    def walk() -> None:
        for each in inputs:
            run(*each)  # what it returns goes at once, as in a model: kept, it would be fresh memory every time

    return len(inputs) * amount / typical(walk)
