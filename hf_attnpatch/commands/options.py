"""Shared arguments of the commands, and the display of errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..showing import line, visible
from . import catalogue
from .voice import complain

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint folder, a hub name, or `embedded`.",
        show_default=False,
        autocompletion=catalogue.completed_models,
    ),
]
Patches = Annotated[
    list[str],
    typer.Option(
        "--patch",
        "-p",
        metavar="NAME:FIELD=VALUE,...",
        help="Repeat it to apply several, in order; `attnpatch patches` lists names and fields.",
        autocompletion=catalogue.completed_patches,
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="A YAML list of patches; they come before --patch.")
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Text (or JSON lines) to fit grouped_query on; self: the model's own.",
    ),
]
Sequences = Annotated[int, typer.Option(min=1, help="Windows of calibration text, spread evenly over the file.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's own), float32, bfloat16 or float16.",
        autocompletion=lambda: ["auto", "float32", "bfloat16", "float16"],
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of MODEL on the Hub.", show_default=False)
]


def _shard_size(size: str | None) -> str | None:
    """Refuse what is no size, before the work whose outcome it is for."""
    if size is not None and not re.fullmatch(r"[1-9]\d*[KMGT]?B", size):
        raise typer.BadParameter(f"{size!r} is no size; wanted bytes such as 500MB or 5GB.")
    return size


ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Of a file of weights.", callback=_shard_size)
]
NewShards = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Of a file of weights, such as 5GB; by default the files are MODEL's.",
        callback=_shard_size,
        show_default=False,
    ),
]
SHARD = "50GB"  # as transformers has it
Device = Annotated[str, typer.Option(help="Where the model is loaded: cpu, cuda, cuda:1 ...")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code run that the checkpoint, or a task file, carries.")
]
_LONGEST = 1500  # characters of an error
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def check_file(path: Path | None, option: str, keys: Collection[str]) -> None:
    """Refuse a file that cannot or must not be written, before the work whose result it will hold.

    Args:
        path: of JSON; None for none.
        option: by which the user named it.
        keys: that an earlier result of the same command has; any other file stays.

    Raises:
        AttnPatchError: a folder has its name, or a file that of one of its folders, or it holds something else.
    """
    from ..comparing.store import is_result
    from ..errors import AttnPatchError

    if path is None:
        return
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not there.is_dir():
        found = f"{path} is a folder" if path.is_dir() else f"{there} is no folder"
        raise AttnPatchError(f"{option} {path}: {found}; wanted the name of a file.")
    if os.path.lexists(path) and not is_result(path, keys):
        raise AttnPatchError(f"{option} {path}: is there, and no earlier result of this command; name another file.")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Show an error that a user can fix in one line, with exit code 1; a bug keeps its traceback."""
    from ..errors import AttnPatchError

    try:
        with _harmless_logs():
            yield
    except (AttnPatchError, OSError) as error:
        from ..publishing.hub import Hub

        complain(f"attnpatch: {line(Hub().hide(_said(error)), _LONGEST)}")
        raise typer.Exit(1) from error


def _said(error: Exception) -> str:
    """Return an error's message; one of the system without its number, the file name first."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


class _Record(logging.LogRecord):
    """What a library logs: transformers quotes values of configs as they are."""

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return visible(_COLOUR.sub("", super().getMessage()))


@contextlib.contextmanager
def _harmless_logs() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_Record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
