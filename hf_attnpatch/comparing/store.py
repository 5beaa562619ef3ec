"""Finished parts of a comparison on disk: each appears whole or not at all, under the digest of what it depends on."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AttnPatchError


@dataclass(frozen=True)
class Store:
    """A folder of parts.

    Attributes:
        folder: ``NAME.KEY.json`` for each part, the first 16 digits of its key in the name.
    """

    folder: Path

    def get(self, name: str, key: str) -> Any | None:
        """Return the result of a part that depends on just this, or None where it is not finished.

        Raises:
            AttnPatchError: the file is there and damaged.
        """
        file = self._file(name, key)
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text("utf-8"))
            return found["result"] if found["key"] == key else None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise AttnPatchError(
                f"{file}: not a part of a comparison ({error}); delete it to measure it again."
            ) from error

    def put(self, name: str, key: str, result: Any) -> None:
        """Keep the result of a part."""
        write(self._file(name, key), json.dumps({"part": name, "key": key, "result": result}, indent=1) + "\n")

    def _file(self, name: str, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.{key[:16]}.json"


def write(file: Path, data: str | bytes) -> None:
    """Write a file that is there whole or not at all, also where the machine stops in the middle."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as target:
            target.write(data.encode() if isinstance(data, str) else data)
            target.flush()
            os.fsync(target.fileno())
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
