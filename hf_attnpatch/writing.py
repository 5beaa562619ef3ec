"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write(file: Path, data: str | bytes) -> None:
    """Write a file that is there whole or not at all, also where the machine stops in the middle."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(aside, "xb") as target:  # not mkstemp, whose files only their owner may read: the umask says who may
            target.write(data.encode() if isinstance(data, str) else data)
            target.flush()
            os.fsync(target.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
