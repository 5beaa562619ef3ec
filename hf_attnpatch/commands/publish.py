"""``attnpatch push``: publish a patched checkpoint with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models as cli_models
from . import voice
from .command import command
from .options import Device, Dtype, Model, Revision, ShardSize, Trust


def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub.", show_default=False)],
    report: Annotated[Path | None, typer.Option(metavar="FOLDER", help="What `attnpatch compare` wrote.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="The base model, where MODEL was made from a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="In the place of the base model's.")] = None,
    license_file: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="A licence or notice to stand beside the model; may be given again."),
    ] = [],  # noqa: B006 - typer copies it
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; one that is there must agree.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in a repository.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Publish a patched checkpoint: weights, tokenizer and a card, all or nothing. The token is HF_TOKEN or a login."""
    import hf_attnpatch as ap

    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = cli_models.Source(name=model, **where)  # type: ignore[arg-type]  # options by name
    published = ap.push_to_hub(
        source.model(),
        repo_id,
        report=report,
        tokenizer=source.tokenizer(),
        base_model=base_model,
        license=license,
        license_files=license_file,
        private=private,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )
    voice.answer(published)


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "push",
        "attnpatch push out me/gpt2-grouped --report outputs/compare",
        "attnpatch push out me/gpt2-grouped --private --json",
        go_on="the repository is what it was, or whole; the same command starts anew.",
    )(push)
