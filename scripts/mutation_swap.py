"""Change the code of an imported module where it stands, so that whoever holds its functions runs a mutant."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_OURS = ("hf_attnpatch", "test", "conftest")  # modules that may hold a constant under its own name
_UNREAD = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")


def swap(name: str, path: Path, source: str) -> int:
    """Give a module's functions, methods and constants what another text of it says; how many of them that changed.

    Args:
        name: of the module, imported already.
        path: its file.
        source: the other text.
    """
    old, new = sys.modules[name], types.ModuleType(name)
    vars(new).update({key: vars(old).get(key) for key in ("__file__", "__package__", "__spec__")})
    exec(compile(source, str(path), "exec", dont_inherit=True), vars(new))
    own = {key: value for key, value in vars(new).items() if not key.startswith("__") and key in vars(old)}
    return sum(_changed(old, key, vars(old)[key], value) for key, value in own.items())


def _changed(module: types.ModuleType, key: str, old: Any, new: Any) -> int:
    here = getattr(new, "__module__", module.__name__) == module.__name__
    if isinstance(new, type):
        return _class(old, new) if here and isinstance(old, type) else 0
    if any(_functions(new)):
        return _functions_changed(old, new) if here else 0
    if callable(new) or isinstance(new, types.ModuleType) or _same(old, new):
        return 0
    for other in list(sys.modules.values()):
        if other is module or (vars(other).get(key) is old and other.__name__.startswith(_OURS)):
            setattr(other, key, new)
    return 1


def _class(old: type, new: type) -> int:
    count = 0
    for key, value in vars(new).items():
        if key in _UNREAD:
            continue
        before = vars(old).get(key)
        if any(_functions(value)):
            count += _functions_changed(before, value)
        elif not _same(before, value):
            setattr(old, key, value)
            count += 1
    return count


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions of a method, a property or a decorated function, the same for both texts."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        yield from (f for f in (value.fget, value.fset, value.fdel) if f is not None)
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif isinstance(value, types.FunctionType):
        yield value
    if hasattr(value, "__wrapped__"):
        yield from _functions(value.__wrapped__)


def _functions_changed(old: Any, new: Any) -> int:
    count = 0
    for one, other in zip(_functions(old), _functions(new), strict=False):
        if one.__code__ != other.__code__ and len(one.__code__.co_freevars) == len(other.__code__.co_freevars):
            one.__code__ = other.__code__
            count += 1
        for part in ("__defaults__", "__kwdefaults__"):
            if not _same(getattr(one, part), getattr(other, part)):
                setattr(one, part, getattr(other, part))
                count += 1
    if hasattr(old, "cache_clear"):
        old.cache_clear()
    return count


def _same(old: Any, new: Any) -> bool:
    """Whether two values say the same of themselves; what says where it lies says nothing."""
    return repr(old) == repr(new) or " at 0x" in repr(new)
