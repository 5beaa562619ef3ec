"""Stores finished parts of a comparison: written atomically, under the digest of what they depend on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AttnPatchError
from ..schema import fields_of, from_json, text_of
from ..writing import write


@dataclass(frozen=True)
class _Kept:
    """A part as stored in its file."""

    part: str
    key: str
    result: Any


@dataclass(frozen=True)
class Store:
    """A folder of parts.

    Attributes:
        folder: ``NAME.KEY.json`` for each part, the first 16 digits of its key in the name.
    """

    folder: Path

    def get(self, name: str, key: str) -> Any | None:
        """Return the result of a part with this digest, or None if it is not finished.

        Raises:
            AttnPatchError: the file is there and damaged.
        """
        file = self._file(name, key)
        if not file.is_file():
            return None
        try:
            found = fields_of(_Kept, from_json(text_of(file), str(file)), str(file))
        except AttnPatchError as error:
            problem = str(error).rstrip(".")
            raise AttnPatchError(f"{problem}: not a part of a comparison; delete it to measure it again.") from error
        return found.result if found.key == key else None

    def put(self, name: str, key: str, result: Any) -> None:
        """Store the result of a part."""
        write(self._file(name, key), json.dumps({"part": name, "key": key, "result": result}, indent=1) + "\n")

    def _file(self, name: str, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.{key[:16]}.json"


def is_result(file: Path, keys: Collection[str]) -> bool:
    """Return whether a file is JSON with at least these keys: a result of ours, which may be overwritten."""
    try:
        found = from_json(text_of(file), str(file), finite=False)
    except (OSError, AttnPatchError):  # no file, no text, no JSON
        return False
    return isinstance(found, dict) and set(keys) <= set(found)


def check_results(folder: Path, names: Collection[str], metrics: str, keys: Collection[str]) -> None:
    """Refuse a folder in which results would replace foreign files.

    Args:
        folder: need not be there.
        names: of the files that will be written.
        metrics: the one of them that is JSON, by which an earlier result is known.
        keys: that it has.

    Raises:
        AttnPatchError: a file of one of these names is there, and is no earlier result.
    """
    there = sorted(name for name in names if os.path.lexists(folder / name))
    if there and not is_result(folder / metrics, keys):
        raise AttnPatchError(f"{folder} holds {there[0]}, which is no earlier result; choose another folder.")
