"""Results as JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from typing_extensions import Self

from ..errors import AttnPatchError, EvaluationError
from ..schema import fields_of
from ..showing import Shown


class Result(Shown):
    """A frozen dataclass of numbers, strings, tuples, dicts and other results."""

    def to_dict(self) -> dict[str, Any]:
        """Return data for ``json.dumps``; a dict becomes a list of pairs, because JSON keys are strings."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        return {field.name: _plain(getattr(self, field.name)) for field in fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild what :meth:`to_dict` wrote, also after a way through JSON.

        Raises:
            EvaluationError: the fields are not those of this result, or one is of another type or not finite.
        """
        try:
            return fields_of(cls, data, cls.__name__, whole=True)
        except EvaluationError:
            raise
        except AttnPatchError as error:
            raise EvaluationError(f"{str(error).rstrip('.')}; measure again.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, dict):
        return [[key, _plain(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
