"""Writes files atomically."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write(file: Path, data: str | bytes) -> None:
    """Write a file completely or not at all, even if the machine stops in between."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(aside, "xb") as target:  # not mkstemp, which ignores the umask
            target.write(data.encode() if isinstance(data, str) else data)
            target.flush()
            os.fsync(target.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
