"""Texts that may be pasted into a public issue: no path of this machine, no token, one line."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from ..publishing.hub import Hub

_PACKAGES = re.compile(
    r"(?:[A-Za-z]:)?[/\\][^\s'\"]*(?=(?:site|dist)-packages[/\\])"
)  # what stands before installed packages
_LONGEST = 400


def clean(text: str) -> str:
    """Return a text in one line of at most 400 characters, without the folders of this machine and without tokens."""
    line = _PACKAGES.sub("", " ".join(text.split()))
    for folder, name in _folders():
        line = line.replace(folder, name)
    line = Hub().hide(line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _folders() -> list[tuple[str, str]]:
    """Return folders that say something of this machine or its user, longest first, and what stands for each."""
    found = {
        str(Path(__file__).resolve().parents[2]): "<hf_attnpatch>",
        sys.prefix: "<environment>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<temporary>",
        os.getcwd(): ".",
        str(Path.home()): "~",
    }
    return sorted(((k, v) for k, v in found.items() if len(k) > 1), key=lambda pair: -len(pair[0]))
