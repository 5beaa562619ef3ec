"""``attnpatch diagnose``: finds what a checkpoint lacks for some work on a machine, and the patch that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..writing import write
from . import models as cli_models
from . import voice
from .command import command
from .options import Device, Dtype, Model, Revision, Trust, check_file

NAMES = "a100, h100, h200, l4, rtx4090, mi300x or laptop"  # of evaluation/table.py, which torch is imported with
_LIGHT = 4e9  # bytes of weights, which are loaded in seconds


def diagnose(
    model: Model,
    context: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 8,
    hardware: Annotated[
        str,
        typer.Option(metavar="auto|NAME|FILE", help=f"auto measures this one; else {NAMES}; or YAML, JSON of rates."),
    ] = "auto",
    training: Annotated[bool, typer.Option("--training/--no-training", help="Predict a training step too.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the diagnosis here too, as JSON.")] = None,
    measure_again: Annotated[bool, typer.Option("--measure-again", help="Forget what auto has measured.")] = False,
    losses: Annotated[
        bool | None,
        typer.Option(
            "--losses/--no-losses", help="Predict what sharing heads loses, from the weights; by default up to 4 GB."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Predict time and memory of prefill, decoding and training; name what is lacking, and the patch that answers.

    On the CPU weights are loaded only to predict what sharing heads loses, or to prove a fused kernel on them.
    """
    check_file(out, "--out", {"lacks", "prescriptions"})
    import hf_attnpatch as ap

    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = cli_models.Source(name=model, **where)  # type: ignore[arg-type]  # options by name
    loaded = source.skeleton()
    losses = cli_models.size_of(loaded) < _LIGHT if losses is None else losses
    if losses or device != "cpu" or loaded.config._attn_implementation == "eager":
        loaded = source.model()
    found = ap.diagnose(
        loaded,
        context=context,
        batch=batch,
        hardware=hardware,
        training=training,
        measure_again=measure_again,
        losses=losses,
    )
    if out is not None:
        write(out, json.dumps(found.to_dict(), indent=1) + "\n")
    voice.answer(found)


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "diagnose",
        "attnpatch diagnose embedded --context 4096 --batch 16",
        "attnpatch diagnose openai-community/gpt2 --hardware h100 --json",
    )(diagnose)
