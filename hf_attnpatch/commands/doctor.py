"""``attnpatch doctor``: what works in this installation; who reads which field of a checkpoint's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import clear_errors

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
        "  attnpatch doctor",
        "  attnpatch doctor --json > doctor.json",
        "  attnpatch doctor path/to/checkpoint",
        "  attnpatch doctor path/to/checkpoint --write-legacy-keys",
    )
)


def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A checkpoint on this machine.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines and for issue reports.")] = False,
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
    with clear_errors():
        if folder is None:
            _installation(as_json, device, write_legacy_keys)
        else:
            _checkpoint(folder, as_json, write_legacy_keys)


def _installation(as_json: bool, device: str, write_legacy_keys: bool) -> None:
    from rich.console import Console

    from .. import doctor as examine
    from ..doctoring.page import console, show
    from ..errors import AttnPatchError

    if write_legacy_keys:
        raise AttnPatchError(
            "--write-legacy-keys: no FOLDER is given; name the checkpoint whose config.json it is for."
        )
    aside = Console(stderr=True)
    with aside.status("importing") as status:
        report: DoctorReport = examine(device=device, progress=status.update)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        show(report, console())
    raise typer.Exit(0 if report.ok else 1)


def _checkpoint(folder: Path, as_json: bool, write_legacy_keys: bool) -> None:
    from .. import doctor_checkpoint
    from .. import write_legacy_keys as write
    from ..doctoring.page import console, show_checkpoint

    written = write(folder) if write_legacy_keys else None
    report = doctor_checkpoint(folder)
    if as_json:
        keys = {} if written is None else {"legacy_keys": written.to_dict()}
        typer.echo(json.dumps({**report.to_dict(), **keys}, indent=1))
        return
    if written is not None:
        typer.echo(written)
    show_checkpoint(report, console())
