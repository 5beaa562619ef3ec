"""Output of the commands: for people in the width and colour of their terminal, or JSON for machines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer

from .. import showing
from ..showing import visible


@dataclasses.dataclass(frozen=True)
class Voice:
    """The output selected by --json and --quiet."""

    json: bool = False
    quiet: bool = False


_SPOKEN_PLAINLY = Voice()
_NOW: ContextVar[Voice] = ContextVar("voice", default=_SPOKEN_PLAINLY)
_SPECS = "hf_attnpatch.patches"  # of a --config file, which somebody else may have written


@contextmanager
def speaking(as_json: bool, quiet: bool) -> Iterator[None]:
    """Use this output in the block; tables are as wide as the terminal."""
    token = _NOW.set(Voice(as_json, quiet or as_json))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else showing.WIDTH
    try:
        with showing.columns(max(columns, 60)):
            yield
    finally:
        _NOW.reset(token)


def answer(found: Any, data: Mapping[str, Any] | None = None) -> None:
    """Print the answer, with names and notes from checkpoints escaped.

    Args:
        found: as text for people, by ``str()``.
        data: the same for machines; ``found.to_dict()`` unless given.
    """
    if _NOW.get().json:
        typer.echo(json.dumps(_plain(found.to_dict() if data is None else data), indent=1))
    else:
        typer.echo(visible(str(found)))


def answer_for_machines(data: Mapping[str, Any]) -> None:
    """Print what a command has done, if JSON is wanted; people have read it in notes."""
    if _NOW.get().json:
        typer.echo(json.dumps(_plain(data), indent=1))


@contextmanager
def stdout_is_for_machines() -> Iterator[None]:
    """Send what a block and its child processes print to stderr if JSON is wanted, and nowhere with --quiet."""
    if not _NOW.get().quiet:
        yield
        return
    sys.stdout.flush()
    kept, other = os.dup(1), os.dup(2) if _NOW.get().json else os.open(os.devnull, os.O_WRONLY)
    os.dup2(other, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr if _NOW.get().json else io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(other)


def note(said: object) -> None:
    """Print a note beside the answer; not with --quiet, and not with --json."""
    if not _NOW.get().quiet:
        typer.echo(visible(str(said)))


def aside(said: str) -> None:
    """Print to stderr what a long command is doing."""
    if not (_NOW.get().quiet and not _NOW.get().json):
        typer.echo(visible(said), err=True)


def is_json() -> bool:
    """Return whether JSON is wanted."""
    return _NOW.get().json


def complain(text: str) -> None:
    """Print an error to stderr, in red if the terminal and its user allow colours."""
    colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    typer.secho(text, fg=typer.colors.RED if colours else None, err=True)


def patches_of_a_file(context: typer.Context, value: Any, where: str) -> list[str]:
    """Keep the mappings of ``patch:`` in a file for :func:`kept_patches`; return those in command-line form.

    Raises:
        AttnPatchError: neither mappings that name a patch nor text.
    """
    from ..errors import AttnPatchError
    from ..schema import brief

    listed = value if isinstance(value, list) else [value]
    for i, each in enumerate(listed):
        if not (isinstance(each, str) or (isinstance(each, Mapping) and "patch" in each)):
            raise AttnPatchError(f"{where}: patch {i} is {brief(each)}; wanted a mapping with a `patch:`, or text.")
    context.meta[_SPECS] = [each for each in listed if isinstance(each, Mapping)]
    if len(context.meta[_SPECS]) not in (0, len(listed)):
        raise AttnPatchError(f"{where}: patch mixes mappings and text; wanted one of the two, so that order is kept.")
    return [each for each in listed if isinstance(each, str)]


def kept_patches(context: typer.Context) -> list[Mapping[str, Any]]:
    """Return the patches that a --config file gives as mappings."""
    kept: list[Mapping[str, Any]] = context.meta.get(_SPECS, [])
    return kept


def _plain(value: Any) -> Any:
    """Return a JSON value: non-finite numbers become null, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    return str(value)
