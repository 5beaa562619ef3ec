"""For mkdocs: `:class:`, `:func:` and `:mod:` roles in docstrings become plain code, which a page can show."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Replace roles by code."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value).replace("``", "`")
