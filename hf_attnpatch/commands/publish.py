"""``attnpatch push``: publish a patched checkpoint with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models as cli_models
from .options import Device, Dtype, Model, Trust, clear_errors, show


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
    trust_remote_code: Trust = False,
) -> None:
    """Publish a patched checkpoint: weights, tokenizer and a card, all or nothing. The token is HF_TOKEN or a login."""
    with clear_errors():
        import hf_attnpatch as ap

        source = cli_models.Source(name=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
        )
    show(published)
