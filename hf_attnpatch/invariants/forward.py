"""Invariants of forwards without a cache: repeatable, causal, independent of padding and of other rows."""

from __future__ import annotations

import torch

from ..modules.added import LearnedPositions
from ..upstream import words
from .subject import Answer, Subject, compare, cut, pad, unpadded


def repeated(subject: Subject) -> Answer:
    """Two forwards give the same bits."""
    return compare(subject, subject.logits(), subject.logits(), 0.0)


def blind_to_the_future(subject: Subject) -> Answer:
    """Logits do not depend on later tokens."""
    if not subject.generates:
        return "an encoder is bidirectional"
    half = subject.tokens.shape[1] // 2
    other = torch.cat([subject.tokens[:, :half], subject.tokens[:, half:].flip(1)], 1)
    wanted, found = subject.logits(), subject.logits(subject.with_tokens(other))
    return compare(subject, wanted[:, :half], found[:, :half])


def after_a_longer_request(subject: Subject) -> Answer:
    """A request gets the same bits after another, longer one."""
    added = [len(module.weight) for module in subject.model.modules() if isinstance(module, LearnedPositions)]
    limit = min([*subject.anatomy.tables.values(), *added], default=1 << 30) - 4  # some tables start at an offset
    length = subject.tokens.shape[1]
    longer = min(3 * length, limit)
    if longer <= length:
        return f"no longer request fits into the position table of {limit + 4} rows"
    wanted = subject.logits()
    subject.logits({name: ids.repeat(1, 3)[:, :longer] for name, ids in subject.inputs.items()})
    return compare(subject, wanted, subject.logits(), 0.0)


def padded(subject: Subject) -> Answer:
    """Padding changes nothing: on the left for models that generate, on the right for an encoder's input."""
    if not subject.takes(words.MASK):
        return "its forward takes no attention mask"
    found = subject.logits(pad(subject, subject.inputs, 5))
    return compare(subject, unpadded(subject, subject.inputs), cut(subject, found, 5))


def alone_or_in_a_batch(subject: Subject) -> Answer:
    """A short row gets the same logits alone and, padded, in a batch with long ones."""
    if not subject.takes(words.MASK):
        return "its forward takes no attention mask"
    first = {name: ids[: subject.item] for name, ids in subject.inputs.items()}
    tokens = subject.roles.name(words.TOKENS)
    ids = first[tokens]
    by = ids.shape[1] // 2
    short = {**first, tokens: ids[:, by:]}
    long, row = pad(subject, subject.inputs, 0), pad(subject, short, by)
    found = subject.logits({name: torch.cat([long[name], row[name]]) for name in long})
    wanted = unpadded(subject, short)
    return compare(subject, wanted, cut(subject, found, by)[-wanted.shape[0] :])
