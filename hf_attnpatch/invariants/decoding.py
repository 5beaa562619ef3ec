"""Invariants of decoding: with a cache it equals the full forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..evaluation.announcing import announced
from ..probe import largest_difference
from ..stepwise import NoCache, in_pieces, rereads
from ..upstream import words
from .subject import Answer, Subject, compare, left, pad, unpadded


def decoded_token_by_token(subject: Subject) -> Answer:
    """Cached decoding, one token at a time, equals the full forward."""
    return _decoded(subject, [1] * subject.tokens.shape[1])


def decoded_in_two_chunks(subject: Subject) -> Answer:
    """A prefill and a second chunk on its cache equal the full forward."""
    half = subject.tokens.shape[1] // 2
    return _decoded(subject, [half, subject.tokens.shape[1] - half])


def decoded_after_padding(subject: Subject) -> Answer:
    """Cached decoding of left-padded rows equals the full forward without padding."""
    if not left(subject) or not subject.takes(words.MASK):
        return "it does not decode left-padded rows"
    wide = pad(subject, subject.inputs, 5)
    length = wide[subject.stream].shape[1]
    with announced(subject.model, subject.tokens.shape[1]):
        found = _pieces(subject, wide, [length // 2, *[1] * (length - length // 2)])
    return found if isinstance(found, str) else compare(subject, unpadded(subject, subject.inputs), found[:, 5:])


def _decoded(subject: Subject, sizes: Sequence[int]) -> Answer:
    if not subject.generates:
        return "it does not generate"
    wanted = subject.logits()
    with announced(subject.model, subject.tokens.shape[1]):
        found = _pieces(subject, subject.inputs, sizes)
    return found if isinstance(found, str) else compare(subject, wanted, found)


def _pieces(subject: Subject, inputs: Mapping[str, Tensor], sizes: Sequence[int]) -> Tensor | str:
    """Return the logits of all tokens, or proof that the model keeps no cache.

    Raises:
        NoCache: it generates with a cache, and none was found.
    """
    try:
        return in_pieces(subject.model, inputs, sizes)
    except NoCache as error:
        whole = subject.logits(inputs)
        if largest_difference(whole, error.found) <= subject.rounding:
            return error.found  # modules keep a state of their own
        if not rereads(subject.model, subject.inputs):
            raise
        return "generate was seen to read the whole text again for each token: there is no cache"
