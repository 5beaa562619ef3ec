"""Escapes foreign text for where it is shown: a terminal, Markdown, a code block, a notebook.

Names, notes and commands come from checkpoints and result files that anybody can write. They must not move the cursor
of a terminal, run as HTML, become a link or an image, or end the block that contains them.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 140  # columns of a table outside a terminal
_LONGEST = 160  # characters of a repr
_COLUMNS: ContextVar[int] = ContextVar("columns", default=WIDTH)

_UNSEEN = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, half characters, private and unassigned ones, separators
_JOINERS = "\u200c\u200d"  # used by some scripts and emoji
_MARKS = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def visible(text: str) -> str:
    r"""Escape a text for a terminal: control and invisible characters are written as ``\x1b``; newlines stay."""
    return "".join(c if c in "\n\t" or _is_plain(c) else _spelled(c) for c in text)


def line(text: str, limit: int = 10_000) -> str:
    """Return a text on one line, cut to ``limit`` characters."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= limit else f"{flat[: limit - 4]} ..."


def prose(text: str) -> str:
    """Escape a text for a line or a table cell of Markdown: no markup, link or HTML."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", line(text))


def code(text: str) -> str:
    """Return a text as inline code of Markdown, with a fence longer than its backticks."""
    flat = line(text)
    fence = "`" * (_longest(flat) + 1)
    padding = " " if flat.startswith("`") or flat.endswith("`") or not flat.strip() else ""
    return f"{fence}{padding}{flat or ' '}{padding}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Return a text as a code block of Markdown, with a fence that it cannot close."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


@contextmanager
def columns(width: int) -> Iterator[None]:
    """Set the width of tables in the block, in characters."""
    token = _COLUMNS.set(width)
    try:
        yield
    finally:
        _COLUMNS.reset(token)


def rendered(*parts: RenderableType) -> str:
    """Render text and tables as plain text, :data:`WIDTH` columns wide unless :func:`columns` sets another width."""
    from rich.console import Console, Group  # takes a while to import, and not every command shows a table

    console = Console(width=_COLUMNS.get(), color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(Group(*parts), markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


class Shown:
    """Mixin of result dataclasses: a short repr, and a notebook page made from ``str()``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = Shown.__repr__  # type: ignore[method-assign]  # or a dataclass would write one, with all it holds

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {line(self._in_short(), _LONGEST)}>"

    def _in_short(self) -> str:
        """Return a summary in a few words; by default the fields, long ones by their size."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
        return ", ".join(f"{f.name}={_in_short(getattr(self, f.name))}" for f in fields if f.repr)

    def _tables(self) -> Iterable[RenderableType]:
        """Return the tables and lines for the notebook page; none by default."""
        return ()

    def _figures(self) -> Iterable[bytes]:
        """Return pictures for the notebook page, PNG or SVG; none by default, or without matplotlib."""
        return ()

    def _repr_html_(self) -> str:
        images = (f'<img alt="" style="max-width:100%" src="{_data(picture)}">' for picture in self._figures())
        return "\n".join([f'<pre style="overflow-x:auto">{html.escape(visible(str(self)))}</pre>', *images])


def _data(picture: bytes) -> str:
    kind = "svg+xml" if picture.startswith(b"<svg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _in_short(value: object) -> str:
    if isinstance(value, str):
        return repr(line(value, 40))
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, (Mapping, Set, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _is_plain(character: str) -> bool:
    kind = unicodedata.category(character)
    return character in _JOINERS or not (kind in _UNSEEN or kind == "Cf")


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
