"""Results as JSON and back, so that what was measured once need not be measured again."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from ..errors import EvaluationError


class Result:
    """A frozen dataclass of numbers, strings, tuples, dicts and other results."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``json.dumps`` takes; a dict becomes a list of pairs, for JSON has string keys only."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        return {field.name: _plain(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild what :meth:`to_dict` wrote, also after a way through JSON.

        Raises:
            EvaluationError: the fields are not those of this result.
        """
        hints = get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if set(data) != set(names):
            raise EvaluationError(
                f"{cls.__name__}: found the fields {', '.join(sorted(data))}, wanted {', '.join(sorted(names))}; the "
                "file is of another version or another measurement: measure again."
            )
        return cls(**{name: _typed(hints[name], data[name]) for name in names})


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return [[key, _plain(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _typed(next(a for a in inner if a is not types.NoneType), value)
    if origin is tuple:
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_typed(h, item) for h, item in zip(hints, value, strict=True))
    if origin is dict:
        return {key: _typed(inner[1], item) for key, item in value}
    return hint.from_dict(value) if isinstance(hint, type) and issubclass(hint, Result) else value
