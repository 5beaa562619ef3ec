"""Keeps private data out of published files: tokens, passwords, and local paths."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import AttnPatchError

HIDDEN = "<token>"
# What the secrets of services look like, as their makers document them.
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,}"  # OpenAI and its like, Google
    r"|\b(?:gh[opusr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,})"  # GitHub, GitLab
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bSG\.[\w-]{16,}\.[\w-]{16,}"  # AWS, Slack
    r"|\b(?:npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}|dop_v1_[a-f0-9]{40,}|r8_[A-Za-z0-9]{30,}|nvapi-[\w-]{30,})"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*"  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[^-]*-----END [A-Z ]*PRIVATE KEY-----)?"
)
# A name that says that what stands behind it is secret: on a command line, in a URL, in a header.
_NAMES = (
    r"(?:\b|_)(?:(?:access|auth|api|hub|hf|refresh|session|bot|user)[_-]?token|secret|passw(?:or)?d|credentials?"
    r"|(?:api|access|secret|private)[_-]?key|x-amz-(?:signature|credential))\b|[?&]sig\b|\btoken\b|(?-i:\b[A-Z][A-Z0-9_]*_(?:TOKEN|KEY|SECRET|PASSWORD)\b)"
)
_NAMED = re.compile(
    rf"(?:(?:{_NAMES})['\"]?\s*[=:]\s*|--?[\w-]*(?:{_NAMES})\s+|\bauthorization:\s*\w+\s+|\bbearer\s+)['\"]?"
    r"(?P<value>[^\s'\"&;,{}()\[\]<>]{6,})",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)", re.IGNORECASE)  # scheme://user:password@
_NOT_SECRET = re.compile(r"(?:true|false|none|null|\$\w+|\$\{\w+\}|[\d.,]+|[*.x]+)\W*", re.IGNORECASE)

_ABSOLUTE = re.compile(
    r"(?<![\w./~:\\-])(?:file://[\w.-]*)?(?:~[\w-]*)?(?:/[^\s/'\"`<>|;,:*?\\()\[\]{}]+){2,}/?"  # of POSIX
    r"|(?<![\w./~:\\-])(?:file:///*|~[\w-]*/)[^\s/'\"`<>|;,:*?\\()\[\]{}]+/?"
    r"|(?<![\w])[A-Za-z]:[\\/](?:[^\s\\/'\"`<>|;,:*?]+[\\/]*)+|\\\\[\w.-]+\\[^\s'\"`<>|;,:*?]+"  # of Windows
)
# Files whose text is a vocabulary, in which anything may stand.
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt|.*\.model|.*\.codes")
_WEIGHTS = (".safetensors", ".bin", ".png")
_PROGRAMS = (".py", ".jinja")


def hidden(text: str, *known: str | None) -> str:
    """Return a text without the given tokens, and without anything that looks like a secret of any service."""
    for token in known:
        text = text.replace(token, HIDDEN) if token else text
    return _IN_URL.sub(rf"\1{HIDDEN}", _SECRET.sub(HIDDEN, text))


def _holds_secret(text: str, known: tuple[str | None, ...], *, program: bool) -> bool:
    """Return whether a text contains a secret, or a placeholder for one; programs and templates are exempt."""
    if hidden(text, *known) != text:
        return True
    return not program and any(not _NOT_SECRET.fullmatch(found["value"]) for found in _NAMED.finditer(text))


def shortened(text: str) -> str:
    """Replace each absolute path in a text by its last part."""
    return _ABSOLUTE.sub(lambda found: _last(found[0]), text)


def command(text: str) -> str:
    """Replace each absolute path in a command line by its last part, with or without blanks in it."""
    try:
        words = shlex.split(text)
    except ValueError:  # quotes that do not end
        words = []
    short = [_word(word) for word in words]
    return shortened(text if short == words else shlex.join(short))


def _word(word: str) -> str:
    name, sign, value = word.rpartition("=") if not word.startswith(("/", "~")) else ("", "", word)
    return f"{name}{sign}{_last(value)}" if _is_absolute(value) else word


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~", "file:")) or bool(re.match(r"[A-Za-z]:[\\/]|\\\\\w", text))


def _last(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\").removeprefix("file:")).name or "folder"


def cleaned(value: Any) -> Any:
    """Return JSON data with every text shortened; commands are recognised by their key."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, Mapping):
        return {key: _cleaned_at(key, item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, (list, tuple)) else value


def _cleaned_at(key: str, value: Any) -> Any:
    if key == "command" and isinstance(value, str):
        return command(value)
    if key == "commands" and isinstance(value, (list, tuple)):
        return [command(item) if isinstance(item, str) else cleaned(item) for item in value]
    return cleaned(value)


def check(folder: Path, *known: str | None) -> None:
    """Refuse to publish a secret or a local path.

    Args:
        folder: all of its files are looked at, weights, images and vocabularies excepted.
        known: tokens that are in use.

    Raises:
        AttnPatchError: says which file, and what to do.
    """
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in _WEIGHTS):
        name = path.relative_to(folder).as_posix()
        if _VOCABULARY.fullmatch(name):
            continue
        for key, text in _texts(path):
            where = f"{name}, {key}," if key else name
            named = f"{key}={text}" if key else text  # a key may say what stands behind it
            if _holds_secret(named, known, program=path.suffix in _PROGRAMS or key == "chat_template"):
                raise AttnPatchError(f"{where} would publish a token or a password; take it out of the command.")
            place = text if key and key != "content" and _ABSOLUTE.fullmatch(text) else _below(text)  # content: a token
            if place is not None:
                raise AttnPatchError(
                    f"{where} would publish where something lies on this machine ({place}); take it out of the "
                    "config, the tokenizer or the command that it comes from."
                )


def check_links(folder: Path, kinds: Collection[str] | None = None) -> None:
    """Refuse a checkpoint whose files are links to other places, whose targets would be published.

    Args:
        folder: that a model was loaded from; nothing is looked at where it is no folder. The Hub's own cache, which is
            made of links, is as good as a folder.
        kinds: endings of the files to look at; all of them unless given.

    Raises:
        AttnPatchError: says which link, and where it leads.
    """
    within = {folder.resolve(), *([folder.resolve().parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])}
    links = [path for path in folder.rglob("*") if path.is_symlink()] if folder.is_dir() else []
    for path in links:
        if (kinds is None or path.suffix in kinds) and not within & {path.resolve(), *path.resolve().parents}:
            raise AttnPatchError(
                f"{path} is a link to {path.resolve()}, outside of the checkpoint, of which it would become a part; "
                "put a file in its place if that is wanted."
            )


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the texts of a file, each with its key, if it has one."""
    text = path.read_text("utf-8", errors="replace")
    if path.suffix == ".json":
        yield from _strings("", json.loads(text))
    else:
        yield "", text


def _strings(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            yield from _strings(name, item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item)


def _below(text: str) -> str | None:
    """Return the local folder that contains a path in a text, or None."""
    return next((p for p in _places() if re.search(rf"(?<![\w.-]){re.escape(p)}(?=[/\\]|$|\W)", text)), None)


def _places() -> list[str]:
    """Return local folders with which a path may begin, none so short that other words begin with it."""
    found = {os.path.expanduser("~"), os.getcwd(), os.path.realpath(os.getcwd()), tempfile.gettempdir()}
    return sorted(place for place in found if len(place) > 3)
