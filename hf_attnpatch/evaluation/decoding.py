"""Tokens per second, cache bytes and peak memory against context, with the machine's limits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import EvaluationError
from ..progress import track
from ..upstream import words
from ..upstream.caches import returned
from ..upstream.roles import predicted, run
from .announcing import announced
from .limits import Limits, limits
from .memory import held_bytes, peak_memory, weight_bytes
from .mode import device_of, measuring
from .operations import Phantom
from .result import Result
from .timing import clock


@dataclass(frozen=True)
class DecodingAt(Result):
    """The measurements at one context.

    Attributes:
        context: tokens in the cache.
        prefill_seconds: least time of a forward over the whole context that keeps its cache.
        decode_seconds: median time of a further token.
        prefill_tokens_per_second: tokens of the context, of all sequences, over ``prefill_seconds``.
        decode_tokens_per_second: of all sequences.
        prefill_limit: tokens per second if its operations ran at the rate of a large matrix product; None where the
            model cannot be counted without running it.
        decode_limit: tokens per second if the memory delivered weights and cache once for each token.
        cache_bytes: of the cache after the prefill.
        peak_bytes: most memory in use meanwhile, weights included: of the process on a CPU, of the allocator on CUDA;
            None where the system does not say.
    """

    context: int
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_limit: float | None
    decode_limit: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class Decoding(Result):
    """Decoding against context.

    Attributes:
        model: class name.
        dtype: of its weights.
        batch: sequences.
        device: type.
        threads: that torch used.
        limits: of this machine, measured just before.
        rows: one for each context.
    """

    model: str
    dtype: str
    batch: int
    device: str
    threads: int
    limits: Limits
    rows: tuple[DecodingAt, ...]


def decoding(
    model: PreTrainedModel,
    contexts: Sequence[int] = (512, 2048, 8192),
    *,
    batch: int = 1,
    tokens: int = 16,
    repeats: int = 2,
) -> Decoding:
    """Measure prefill and decoding at several contexts.

    Each is a forward over the whole context, which keeps keys and values and computes the logits of the last token
    only, as ``generate`` does; then further tokens, one by one. With one thread times are CPU time, so that neighbours
    on the machine count little; with more, wall time.

    Args:
        model: a causal language model, patched or not; run in eval mode, put back as it was.
        contexts: in tokens.
        batch: sequences.
        tokens: further tokens at each context; they lengthen it by as many.
        repeats: prefills at each context, of which the fastest counts.

    Raises:
        EvaluationError: a length that is no whole number above 0, a model that keeps no keys and values, a context
            that is longer than its table of positions, logits that are not finite.
    """
    for name, given in (("contexts", contexts), ("batch", [batch]), ("tokens", [tokens]), ("repeats", [repeats])):
        _check(name, given)
    device, phantom = device_of(model), Phantom(model)
    if not phantom.decodes:
        raise EvaluationError(f"{type(model).__name__} takes no cache, so there is no decoding to measure.")
    dtype = next(model.parameters()).dtype
    with measuring(model):
        best = limits(dtype, device)
        rows = [_at(model, phantom, n, (batch, tokens, repeats), best) for n in track(list(contexts), "decoding")]
    return Decoding(
        model=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        device=device.type,
        threads=torch.get_num_threads(),
        limits=best,
        rows=tuple(rows),
    )


def _check(name: str, given: Sequence[int]) -> None:
    wrong = [n for n in given if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong or not given:
        raise EvaluationError(f"decoding: {name} {list(given)!r}; wanted whole numbers above 0.")


def _at(model: PreTrainedModel, phantom: Phantom, context: int, how: tuple[int, int, int], best: Limits) -> DecodingAt:
    batch, tokens, repeats = how
    steps, fills = [], []
    with peak_memory(device_of(model)) as peak:
        with announced(model, context + tokens):
            for _ in range(repeats):
                seconds, cache = prefill(model, context, batch)
                fills.append(seconds)
            cache_bytes = held_bytes(cache)
            steps += [step(model, cache, batch) for _ in range(tokens)]
    fill, each = min(fills), statistics.median(steps)
    flops = _flops(phantom, batch, context)
    read = weight_bytes(model, batch) + cache_bytes
    return DecodingAt(
        context=context,
        prefill_seconds=fill,
        decode_seconds=each,
        prefill_tokens_per_second=batch * context / fill,
        decode_tokens_per_second=batch / each,
        prefill_limit=None if flops is None else batch * context * best.flops_per_second / flops,
        decode_limit=batch * best.bytes_per_second / read,
        cache_bytes=cache_bytes,
        peak_bytes=peak.bytes,
    )


def prefill(model: PreTrainedModel, context: int, batch: int) -> tuple[float, Any]:
    """Return the seconds of a forward over a context, and the cache that it filled.

    Raises:
        EvaluationError: see :func:`decoding`.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(batch * context, device=device_of(model)).view(batch, context) % vocabulary
    try:
        seconds, out = _timed(model, ids, None)
    except IndexError as error:
        raise EvaluationError(
            f"context {context}: {type(model).__name__} cannot look up so many positions; choose shorter contexts."
        ) from error
    cache = next(iter(returned(out).values()), None)
    if cache is None:
        raise EvaluationError(f"{type(model).__name__} returned no cache, so there is no decoding to measure.")
    if not bool(predicted(out).isfinite().all()):
        raise EvaluationError(f"context {context}: the logits of the last token are not finite; nothing was measured.")
    return seconds, cache


def step(model: PreTrainedModel, cache: Any, batch: int) -> float:
    """Return the seconds of one further token, which stays in the cache."""
    return _timed(model, torch.zeros(batch, 1, dtype=torch.long, device=device_of(model)), cache)[0]


def _timed(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> tuple[float, Any]:
    more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    given = {words.TOKENS: ids, words.USE_CACHE: True, **({} if cache is None else {words.CACHE: cache})}
    begin = clock()
    out = run(model, given, **more)
    return clock() - begin, out


def _flops(phantom: Phantom, batch: int, context: int) -> int | None:
    try:
        return sum(op.flops for op in phantom.forward(batch, context).operations)
    except EvaluationError:  # it branches on values: documented as None
        return None
