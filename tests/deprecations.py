"""Deprecations of transformers that our own code causes: recorded while tests run, however they are announced.

transformers announces them by `warnings.warn`, whose `stacklevel` points into torch where a module is called, and by
`logger.warning_once`, which speaks once in a process. So neither a filter of warnings nor the log tells who is at
fault; the stack does, at the moment of the call. At fault is the nearest frame of the package, the recipes, the scripts
or the tests that

* calls the deprecated thing itself, through no more than torch, the standard library and transformers' decorators, or
* passes an argument of the name that is called deprecated to whatever goes on to call it.

A frame that hands on by `**kwargs` what it was given is not at fault; its caller may be. What transformers does by
itself inside a call of ours is its own affair.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / name}/" for name in ("hf_attnpatch", "recipes", "scripts", "tests"))
UPSTREAM = f"{Path(transformers.__file__).parent}/"
LOG = f"{UPSTREAM}utils/logging.py"  # where `warning_once` goes on to `warning`
TRANSPARENT = (
    f"{UPSTREAM}utils/",  # its decorators, output classes and lazy imports
    f"{Path(torch.__file__).parent}/",
    f"{sysconfig.get_path('stdlib')}/",
    "<",  # <frozen importlib._bootstrap>, <string>
)
SITES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def fault(message: str, frame: FrameType | None) -> str | None:
    """Says where our code causes a deprecation, as "file:line", or None where it does not.

    Args:
        message: what transformers says; names in backquotes before the word "deprecated" are those of arguments.
        frame: the frame of transformers that says so.
    """
    names = set(re.findall(r"`(\w+)`", re.split("deprecat", message, maxsplit=1)[0]))
    below: list[FrameType] = []
    for each in _outwards(frame):
        if not _is_ours(each):
            below.append(each)
        elif names & _handed_on(each).keys():  # it was given the name, and gives it on
            below.append(each)
        elif all(_is_transparent(inner) for inner in below[1:]) or names & _given(below[-1]).keys():
            return f"{Path(each.f_code.co_filename).relative_to(ROOT)}:{each.f_lineno}"
        else:
            return None
    return None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(OURS)


def _is_transparent(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(TRANSPARENT) and not (name.startswith(SITES) and not name.startswith(TRANSPARENT[:2]))


def _handed_on(frame: FrameType) -> dict[str, Any]:
    """The `**kwargs` that a frame was called with."""
    code = frame.f_code
    if not code.co_flags & 0x08:  # CO_VARKEYWORDS
        return {}
    position = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)  # CO_VARARGS
    found = frame.f_locals.get(code.co_varnames[position])
    return found if isinstance(found, dict) else {}


def _given(frame: FrameType) -> dict[str, Any]:
    """The arguments that a frame was called with, but for those that are None."""
    named = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
    values = {name: frame.f_locals.get(name) for name in named}
    return {name: value for name, value in (values | _handed_on(frame)).items() if value is not None}


class Watch:
    """Replaces the three calls by which deprecations are announced, and keeps those that our code causes."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}

    def start(self) -> None:
        """Replaces them, for the rest of the process."""
        warnings.warn = self._warn(warnings.warn)
        logging.Logger.warning = self._log(logging.Logger.warning, stacklevel=2)
        logging.Logger.warning_once = self._log(logging.Logger.warning_once)  # it is cached, this is not

    def take(self) -> list[str]:
        """What was found since it was last taken: "file:line: message", each once."""
        found, self.found = list(self.found), {}
        return found

    def _note(self, message: str, frame: FrameType) -> None:
        name = frame.f_code.co_filename
        if name.startswith(UPSTREAM) and name != LOG:
            where = fault(message, frame)
            if where is not None:
                self.found[f"{where}: {' '.join(message.split())}"] = None

    def _warn(self, warn: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(warn)
        def watched(message: Any, category: Any = None, stacklevel: int = 1, *rest: Any, **more: Any) -> None:
            kind = type(message) if isinstance(message, Warning) else category or UserWarning
            if issubclass(kind, (FutureWarning, DeprecationWarning)):
                self._note(str(message), sys._getframe(1))
            warn(message, category, stacklevel + 1, *rest, **more)

        return watched

    def _log(self, log: Callable[..., None], **place: int) -> Callable[..., None]:
        @functools.wraps(log)
        def watched(logger: logging.Logger, message: Any, *rest: Any, **more: Any) -> None:
            if "deprecat" in str(message):
                self._note(str(message), sys._getframe(1))
            log(logger, message, *rest, **{**place, **more})

        return watched


WATCH = Watch()
