"""Text from elsewhere, made harmless for where it is shown: a terminal, Markdown, a code block.

Names, notes and commands come from checkpoints and result files, which strangers make. Nothing of them may move the
cursor of a terminal, run as HTML, become a link or an image, or end the block that it stands in.
"""

from __future__ import annotations

import re
import unicodedata

_UNSEEN = {"Cc", "Cs", "Co", "Cn", "Zl", "Zp"}  # controls, half characters, private and unassigned ones, separators
_JOINERS = "\u200c\u200d"  # which some scripts and emoji are written with
_MARKS = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def visible(text: str) -> str:
    r"""Return a text for a terminal: what would act there, or not be seen, is spelled out, as ``\x1b``; lines stay."""
    return "".join(c if c in "\n\t" or _is_plain(c) else _spelled(c) for c in text)


def line(text: str, limit: int = 10_000) -> str:
    """Return a text on one line, cut where it is longer than ``limit`` characters."""
    flat = visible(" ".join(text.split()))
    return flat if len(flat) <= limit else f"{flat[: limit - 4]} ..."


def prose(text: str) -> str:
    """Return a text for a line or a table cell of Markdown: it reads as it is, and is no markup, link or HTML."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", line(text))


def code(text: str) -> str:
    """Return a text as inline code of Markdown, whatever backticks it holds."""
    flat = line(text)
    fence = "`" * (_longest(flat) + 1)
    padding = " " if flat.startswith("`") or flat.endswith("`") or not flat.strip() else ""
    return f"{fence}{padding}{flat or ' '}{padding}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Return a text as a code block of Markdown, behind a fence that nothing in it can close."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def _longest(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _is_plain(character: str) -> bool:
    kind = unicodedata.category(character)
    return character in _JOINERS or not (kind in _UNSEEN or kind == "Cf")


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
