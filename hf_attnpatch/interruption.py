"""Restores state even if Ctrl-C arrives at any line.

Two rules hold everywhere: the way back is known before the first write, and it may be taken twice. An interrupted way
back starts again from the beginning, and signals are held until it is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from torch.utils.hooks import RemovableHandle

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM") if hasattr(signal, name))

T = TypeVar("T")


class _Waiting:
    """Holds signals that have a Python handler; only the main thread receives any."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.came: list[int] = []

    def begin(self) -> None:
        """Only record signals from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self.handlers[number] = handler  # known before the write
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came.append(number)

    def end(self) -> None:
        """Restore the handlers, and deliver the recorded signals."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        came, self.came = self.came, []
        for number in came:
            signal.raise_signal(number)


def complete(put_back: Callable[[], object]) -> None:
    """Call a function that restores state; if it is interrupted, call it again before the interruption continues.

    Args:
        put_back: does nothing if it was called before.
    """
    waiting = _Waiting()
    try:
        try:
            waiting.begin()
            put_back()
        except BaseException:
            put_back()
            raise
        finally:
            waiting.end()
    except BaseException:  # the line above was interrupted
        waiting.end()
        raise


@contextlib.contextmanager
def ensured(put_back: Callable[[], object]) -> Iterator[None]:
    """Restore state at the end of a block, however it ends; after an exception twice.

    Args:
        put_back: as for :func:`complete`.
    """
    try:
        try:
            yield
        finally:
            complete(put_back)
    except BaseException:  # the line above was interrupted
        complete(put_back)
        raise


def all_or_nothing(call: Callable[[], T], put_back: Callable[[], object]) -> T:
    """Call a function, and restore state if it does not finish.

    A function, since a ``with`` statement can be interrupted between its block and its manager.

    Args:
        call: what to do; its result is returned.
        put_back: as for :func:`complete`.
    """
    try:
        try:
            return call()
        except BaseException:
            complete(put_back)
            raise
    except BaseException:  # the lines above were interrupted
        complete(put_back)
        raise


def inside(manager: contextlib.AbstractContextManager[Any], call: Callable[[], T]) -> T:
    """Call a function inside a context manager that must be exited, such as one of torch's modes."""
    open_: list[tuple[contextlib.AbstractContextManager[Any], Any]] = []

    def leave() -> None:
        if open_:
            open_.pop()[0].__exit__(None, None, None)

    try:
        try:
            open_[:] = [(manager, manager.__enter__())]
            return call()
        finally:
            complete(leave)
    except BaseException:  # the line above was interrupted
        complete(leave)
        raise


@contextlib.contextmanager
def entered(manager: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context manager that must be exited."""
    open_: list[tuple[contextlib.AbstractContextManager[Any], Any]] = []

    def leave() -> None:
        if open_:
            open_.pop()[0].__exit__(None, None, None)

    with ensured(leave):
        open_[:] = [(manager, manager.__enter__())]
        yield


@contextlib.contextmanager
def removing() -> Iterator[list[RemovableHandle]]:
    """Remove, at the end of a block, the hooks whose handles were added to the list."""
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with ensured(remove):
        yield handles


__all__ = ["all_or_nothing", "complete", "ensured", "entered", "inside", "removing"]
