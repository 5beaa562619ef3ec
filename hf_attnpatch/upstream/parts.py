"""Results that consist of several tensors: a tuple, a named tuple or a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .find import changed


def parts_of(value: Any) -> tuple[Any, ...] | None:
    """Return the parts of a result, in order; None for anything but a tuple, list or dataclass."""
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return None


def made_like(value: Any, parts: Sequence[Any], purpose: str) -> Any:
    """Return a result of the same type with other parts.

    Args:
        value: of the type.
        parts: in its order.
        purpose: what needs it, for the error.

    Raises:
        UpstreamChanged: it is no tuple, list or dataclass.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if parts_of(value) is None:
        raise changed(f"a {type(value).__name__} in the place of a tuple of tensors", purpose)
    names = (field.name for field in dataclasses.fields(value))
    return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
