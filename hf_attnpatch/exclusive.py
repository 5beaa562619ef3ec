"""Locks: one thread at a time patches or probes a model."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .interruption import ensured

# Keyed by the id of the model's config, which the parts of a model share. The locks are kept here, so that a model can
# be copied, pickled and saved.
_LOCKS: dict[int, Any] = {}


def lock_of(model: object) -> Any:
    """Return the lock of a model, which is re-entrant.

    Args:
        model: a model, or a part of one with its config; anything else gets a lock of its own.
    """
    if not isinstance(model, nn.Module):
        return threading.RLock()
    owner: Any = getattr(model, "config", model)
    owner = owner if hasattr(owner, "__weakref__") else model
    new = threading.RLock()
    lock = _LOCKS.setdefault(id(owner), new)  # atomic
    if lock is new:
        weakref.finalize(owner, _LOCKS.pop, id(owner), None)
    return lock


@contextlib.contextmanager
def alone(lock: Any) -> Iterator[None]:
    """Hold a lock for the length of a block."""
    held = [False]

    def release() -> None:
        held[0] = held[0] and bool(lock.release())  # None: not held any more

    with ensured(release):
        held[0] = lock.acquire()
        yield


__all__ = ["alone", "lock_of"]
