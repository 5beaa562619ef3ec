"""``attnpatch doctor``: tests this installation, and tells who reads which field of a checkpoint's config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import voice
from .command import command

if TYPE_CHECKING:
    from ..doctoring.result import DoctorReport

HELP = "\n\n".join(
    (
        "Say what works in this installation; or, of a FOLDER, who reads which field of its config.",
        "Without FOLDER every patch is tried on small models (applied, decoded with a cache on a left-padded batch, "
        "reverted), every attention kernel is run, every extra imported, in less than a minute. Exits with 1 where "
        "something that should work does not.",
        "With FOLDER, a checkpoint: which fields of its config are read by transformers 5 (the installed release is "
        "asked), by readers written for transformers 4, by llama.cpp's converter and by vLLM, and which each ignores "
        "without a word. Weights are not loaded, and code of the checkpoint does not run.",
    )
)


def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A checkpoint on this machine.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where patches are tried: cpu, cuda, cuda:1 ...")] = "cpu",
    write_legacy_keys: Annotated[
        bool,
        typer.Option(
            "--write-legacy-keys",
            help="Write rope_theta, rope_scaling and torch_dtype into FOLDER's config.json, for readers of version 4.",
        ),
    ] = False,
) -> None:
    """Examine an installation or a checkpoint; see :data:`HELP`."""
    if folder is None:
        _installation(device, write_legacy_keys)
    else:
        _checkpoint(folder, write_legacy_keys)


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "doctor",
        "attnpatch doctor",
        "attnpatch doctor --json > doctor.json",
        "attnpatch doctor path/to/checkpoint",
        "attnpatch doctor path/to/checkpoint --write-legacy-keys",
        help=HELP,
    )(doctor)


def _installation(device: str, write_legacy_keys: bool) -> None:
    from rich.console import Console

    from .. import doctor as examine
    from .. import progress
    from ..doctoring.page import console, show
    from ..errors import AttnPatchError

    if write_legacy_keys:
        raise AttnPatchError(
            "--write-legacy-keys: no FOLDER is given; name the checkpoint whose config.json it is for."
        )
    aside = Console(stderr=True, quiet=progress.is_silent())
    with aside.status("importing") as status:
        report: DoctorReport = examine(device=device, progress=status.update)
    if voice.is_json():
        voice.answer(report)
    else:
        show(report, console())
    raise typer.Exit(0 if report.ok else 1)


def _checkpoint(folder: Path, write_legacy_keys: bool) -> None:
    from .. import doctor_checkpoint
    from .. import write_legacy_keys as write
    from ..doctoring.page import console, show_checkpoint

    written = write(folder) if write_legacy_keys else None
    report = doctor_checkpoint(folder)
    if voice.is_json():
        keys = {} if written is None else {"legacy_keys": written.to_dict()}
        voice.answer(report, {**report.to_dict(), **keys})
        return
    if written is not None:
        voice.note(written)
    show_checkpoint(report, console())
