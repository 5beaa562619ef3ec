"""``attnpatch diagnose``: what a checkpoint lacks for some work on some machine, and which patch answers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..writing import write
from . import models as cli_models
from .options import Device, Dtype, Model, Trust, check_file, clear_errors, show

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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the diagnosis here too.")
    ] = None,
    measure_again: Annotated[bool, typer.Option("--measure-again", help="Forget what auto has measured.")] = False,
    losses: Annotated[
        bool | None,
        typer.Option(
            "--losses/--no-losses", help="Predict what sharing heads loses, from the weights; by default up to 4 GB."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    trust_remote_code: Trust = False,
) -> None:
    """Predict time and memory of prefill, decoding and training; name what is lacking, and the patch that answers.

    On the CPU weights are loaded only to predict what sharing heads loses, or to prove a fused kernel on them.
    """
    with clear_errors():
        check_file(json_file, "--json", {"lacks", "prescriptions"})
        import hf_attnpatch as ap

        source = cli_models.Source(name=model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
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
        if json_file is not None:
            write(json_file, json.dumps(found.to_dict(), indent=1) + "\n")
    show(found)
