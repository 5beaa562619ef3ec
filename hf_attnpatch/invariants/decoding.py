"""Decoding with a cache equals the full forward."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rope.request_length import request, requests_of
from .subject import Answer, Subject, compare, left, logits_of, pad, unpadded

_CACHES = ("past_key_values", "cache_params")


def decoded_token_by_token(subject: Subject) -> Answer:
    """Cached decoding, a token at a time, equals the full forward."""
    return _decoded(subject, [1] * subject.tokens.shape[1])


def decoded_in_two_chunks(subject: Subject) -> Answer:
    """A prefill and a second chunk on its cache equal the full forward."""
    half = subject.tokens.shape[1] // 2
    return _decoded(subject, [half, subject.tokens.shape[1] - half])


def decoded_after_padding(subject: Subject) -> Answer:
    """Cached decoding of left-padded rows equals the full forward without padding."""
    if not left(subject) or not subject.takes("attention_mask"):
        return "it does not decode left-padded rows"
    wide = pad(subject, subject.inputs, 5)
    length = wide["input_ids"].shape[1]
    with _announced(subject):
        found = _decode(subject, wide, [length // 2, *[1] * (length - length // 2)])
    if isinstance(found, str):
        return found
    return compare(subject, unpadded(subject, subject.inputs), found[:, 5:])


def _decoded(subject: Subject, sizes: Sequence[int]) -> Answer:
    if not subject.generates:
        return "it does not generate"
    wanted = subject.logits()
    with _announced(subject):
        found = _decode(subject, subject.inputs, sizes)
    return found if isinstance(found, str) else compare(subject, wanted, found)


def _announced(subject: Subject) -> contextlib.AbstractContextManager[None]:
    """Say how long the rows will be, to a model whose angles follow from that."""
    if requests_of(subject.model) is None:
        return contextlib.nullcontext()
    return request(subject.model, subject.tokens.shape[1])


def _decode(subject: Subject, inputs: Mapping[str, Tensor], sizes: Sequence[int]) -> Tensor | str:
    """Return the logits of all tokens, fed in pieces of these sizes, or why that cannot be."""
    if not subject.takes("use_cache"):
        return "its forward takes no cache"
    state: dict[str, Any] = {}
    pieces, start = [], 0
    for size in sizes:
        end = start + size
        piece = {**inputs, subject.stream: inputs[subject.stream][:, start:end]}
        if "position_ids" in inputs:
            piece["position_ids"] = inputs["position_ids"][:, start:end]
        if "attention_mask" in inputs and left(subject):
            piece["attention_mask"] = inputs["attention_mask"][:, :end]
        output = subject.run(piece, use_cache=True, **state)
        state = {name: output[name] for name in _CACHES if output.get(name) is not None and subject.takes(name)}
        if not state:
            return f"its forward returns neither {' nor '.join(_CACHES)}"
        pieces.append(logits_of(output))
        start = end
    return torch.cat(pieces, 1)
