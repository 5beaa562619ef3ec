"""The patches and their fields, read from the source of the one-liners, without importing a model class."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Field:
    """A field of a patch.

    Attributes:
        name: of the field.
        type: as Python spells it.
        default: likewise; None where it must be given.
        what: what it is, with its unit.
    """

    name: str
    type: str
    default: str | None
    what: str


@dataclass(frozen=True)
class Entry:
    """A patch.

    Attributes:
        name: by which ``--patch`` knows it.
        what: what it does, in a sentence.
        experimental: whether its fields may still get other names or defaults.
        fields: in order.
    """

    name: str
    what: str
    experimental: bool
    fields: tuple[Field, ...]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return all patches, by name."""
    tree = ast.parse(Path(__file__).parents[1].joinpath("one_liners.py").read_text("utf-8"))
    return tuple(_entry(node) for node in tree.body if isinstance(node, ast.FunctionDef))


def _entry(node: ast.FunctionDef) -> Entry:
    said = inspect.cleandoc(ast.get_docstring(node) or "")
    told = dict(_told(said.partition("\nArgs:\n")[2].partition("\n\n")[0]))
    fields = (
        Field(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            None if default is None else ast.unparse(default),
            told[argument.arg],
        )
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    )
    name = node.name.removeprefix("patch_")
    return Entry(name, said.splitlines()[0].replace("`", ""), "\nExperimental: " in said, tuple(fields))


def _told(section: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        yield found[1], re.sub(r":\w+:`|`", "", " ".join(found[2].split()))


def completed_patches(incomplete: str) -> Iterator[str]:
    """Yield completions of ``--patch``: names, then fields that are still missing."""
    name, sign, rest = incomplete.partition(":")
    if not sign:
        yield from (entry.name for entry in entries() if entry.name.startswith(name))
        return
    entry = next((entry for entry in entries() if entry.name == name), None)
    done, _, last = rest.rpartition(",")
    taken = {part.partition("=")[0] for part in done.split(",")}
    for field in () if entry is None else entry.fields:
        if field.name.startswith(last) and field.name not in taken:
            yield f"{name}:{done}{',' if done else ''}{field.name}="


def completed_models(incomplete: str) -> Iterator[str]:
    """Yield the embedded model and folders that contain a config."""
    if "embedded".startswith(incomplete):
        yield "embedded"
    parent = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    for folder in sorted(parent.iterdir()) if parent.is_dir() else ():
        if folder.is_dir() and str(folder).startswith(incomplete.removeprefix("./")):
            yield f"{folder}" if (folder / "config.json").is_file() else f"{folder}/"
