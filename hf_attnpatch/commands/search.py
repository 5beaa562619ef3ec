"""``attnpatch search-rope MODEL``: LongRoPE's search on your own text, and a checkpoint of the result."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import models as cli_models
from . import specs as cli_specs
from . import text as cli_text
from . import voice
from .command import command
from .options import Device, Dtype, Model, NewShards, Revision, Trust
from .place import check_room
from .replacing import replacing
from .rewriting import Rewriting, reread

if TYPE_CHECKING:
    from torch import Tensor

Target = Annotated[
    int, typer.Option("--target-length", "--target", min=2, help="Tokens of context that the model is to read.")
]
Data = Annotated[Path, typer.Option(metavar="FILE", help="Text, or JSON lines with a field text.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Save the model with what was found here.")]
Count = Annotated[int, typer.Option(min=1, help="Windows of text that are searched on, spread evenly over the file.")]
HeldOut = Annotated[int, typer.Option(min=0, help="Further windows, not searched on, that the result is judged by.")]
Targets = Annotated[int | None, typer.Option(min=1, help="Last tokens of a window that are predicted; half of them.")]
Population = Annotated[int, typer.Option(min=8, help="Divisors that are kept; the paper's number.")]
Iterations = Annotated[int, typer.Option(min=1, help="The paper's number.")]
Minutes = Annotated[float | None, typer.Option(help="Scale both down so that the search takes about so long.")]
Step = Annotated[float, typer.Option(help="Of the grid that divisors are drawn from.")]
Attention = Annotated[float | None, typer.Option("--attention-factor", help="On cos and sin; the paper's otherwise.")]
Seed = Annotated[int, typer.Option(help="The same seed finds the same divisors.")]
Kept = Annotated[
    Path | None, typer.Option("--state", metavar="FILE", help="Written as it goes; where it is there, go on from it.")
]


def search_rope(
    context: typer.Context,
    model: Model,
    target: Target,
    data: Data,
    out: Out = None,
    windows: Count = 5,
    held_out: HeldOut = 5,
    targets: Targets = None,
    population: Population = 64,
    iterations: Iterations = 40,
    minutes: Minutes = None,
    step: Step = 0.01,
    attention_factor: Attention = None,
    seed: Seed = 0,
    state: Kept = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    max_shard_size: NewShards = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is there.")] = False,
) -> None:
    """Search the divisors of rotary frequencies with the lowest loss on your text, as LongRoPE does; can be resumed.

    An interrupted search goes on where --state was written.
    """
    import hf_attnpatch as ap

    where = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = cli_models.Source(name=model, **where)  # type: ignore[arg-type]  # options by name
    effort = {"population": population, "iterations": iterations, "minutes": minutes, "step": step, "seed": seed}
    options = {"targets": targets, "attention_factor": attention_factor, "state": state, **effort}
    with _place(out, overwrite, {"MODEL": model, "--data": data, "--state": state}) as folder:
        searched, kept = _parted(read_windows(data, source, windows + held_out, target), windows)
        work = None if folder is None else Rewriting(source)
        loaded = source.model() if work is None else work.model
        if out is not None:
            check_room(out, cli_models.size_of(loaded))  # before hours of work
        found = ap.search_rope(loaded, target=target, documents=searched, **options)  # type: ignore[arg-type]
        voice.note(found)
        judged = _judged(loaded, found, kept, target, targets or target // 2) if kept else {}
        if judged:
            voice.note(_told(judged, len(kept)))
        spec = _spec(found.patch)
        voice.note(f"as --patch: {spec}")
        if folder is not None and work is not None:
            for said in work.save(ap.apply(loaded, found.patch), folder, cli_specs.spelled(context), max_shard_size):
                voice.note(said)
            del loaded
            reread(folder, work.release(), source)
    if out is not None:
        voice.note(f"saved {out}")
    voice.answer_for_machines({"search": found, "patch": spec, "held_out": judged, "saved": out})


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "search-rope",
        "attnpatch search-rope embedded --target-length 2048 --data text.txt --minutes 10 --state search.json",
        "attnpatch search-rope embedded --target-length 2048 --data text.txt --out out",
        go_on="with --state FILE the same command goes on where it was; without, it starts anew.",
    )(search_rope)


def _place(
    out: Path | None, overwrite: bool, inputs: Mapping[str, str | Path | None]
) -> contextlib.AbstractContextManager[Path | None]:
    return contextlib.nullcontext() if out is None else replacing(out, overwrite, inputs)


def read_windows(file: Path, source: cli_models.Source, count: int, length: int) -> list[Tensor]:
    """Return windows of whole documents, spread evenly over a file.

    Raises:
        AttnPatchError: the text is too short, or the model has no tokenizer.
    """
    import torch

    from ..errors import AttnPatchError

    documents, tokenizer = cli_text.read(file, "--data"), source.tokenizer()
    if tokenizer is None:
        raise AttnPatchError(f"--data: {source.name} has no tokenizer to read {file} with; add one to it.")
    found = [
        piece
        for document in documents
        for piece in torch.split(torch.tensor(tokenizer(document, verbose=False)["input_ids"]), length)
        if len(piece) == length
    ]
    if len(found) < count:
        raise AttnPatchError(
            f"--data {file}: {len(found)} windows of {length} tokens in {len(documents)} documents, wanted {count}; "
            "give longer text, or lower --windows or --held-out."
        )
    return [found[number * len(found) // count] for number in range(count)]


def _parted(texts: list[Tensor], windows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return windows for the search and others for validation, both spread over the whole text."""
    chosen = {number * len(texts) // windows for number in range(windows)}
    return [t for i, t in enumerate(texts) if i in chosen], [t for i, t in enumerate(texts) if i not in chosen]


def _judged(model: Any, found: Any, texts: list[Tensor], target: int, targets: int) -> dict[str, Any]:
    """Return the losses of the result and of the known kinds on validation text."""
    import hf_attnpatch as ap

    from ..evaluation import perplexity

    scores = {}
    others = [ap.RopeScaling(kind=kind, factor=found.patch.factor) for kind in ("linear", "ntk", "yarn")]
    for patch in (*others, found.patch):
        with ap.patched(model, patch):
            score = perplexity(model, texts, lengths=[target], targets=targets, stride=targets, window=target)[target]
        scores["found" if patch is found.patch else patch.kind] = score
    return scores


def _told(judged: Mapping[str, Any], windows: int) -> str:
    lines = (
        f"{name:>10}  {score.nats:.4f} [{score.low:.4f}, {score.high:.4f}] nats per token"
        for name, score in judged.items()
    )
    return "\n".join([f"on {windows} windows that were not searched on:", *lines])


def _spec(patch: Any) -> str:
    """Return the patch in the form of --patch; a study's configuration takes its fields."""
    lists = {name: getattr(patch, name) for name in ("long_factor", "short_factor") if getattr(patch, name)}
    fields = {"kind": patch.kind, "factor": patch.factor, "attention_factor": patch.attention_factor}
    said = [f"{name}={value}" for name, value in fields.items() if value is not None]
    said += [f"{name}=[{','.join(map(str, values))}]" for name, values in lists.items()]
    return f"{patch.name}:{','.join(said)}"
