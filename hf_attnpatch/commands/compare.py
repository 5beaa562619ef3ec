"""``attnpatch compare A B``: two checkpoints side by side, as a report folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import specs as cli_specs
from . import voice
from .command import command
from .options import Device, Dtype, Trust

Numbers = Annotated[str | None, typer.Option(metavar="N,N,...", help="Context lengths, in tokens.")]


def compare(
    context: typer.Context,
    original: Annotated[
        str, typer.Argument(help="A checkpoint folder, a hub name, or `embedded`.", show_default=False)
    ],
    patched: Annotated[str, typer.Argument(help="Another with the same tokenizer.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder of the report; finished parts in it are not measured again.")
    ] = Path("outputs/compare"),
    parts: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="loss, fidelity, layers, retrieval, decoding; all by default."),
    ] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text, or JSON lines with a field text.")] = None,
    lengths: Numbers = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Windows of text.")] = None,
    task: Annotated[str | None, typer.Option(help="Of retrieval: passkey, needle, niah_multikey_2, vt ...")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Prompts for each length and depth of retrieval.")] = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    original_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Of ORIGINAL on the Hub.")] = None,
    patched_revision: Annotated[str | None, typer.Option(metavar="NAME", help="Of PATCHED on the Hub.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure two checkpoints: report.md, report.html, figures, metrics.json. The same command resumes after a stop."""
    import hf_attnpatch as ap

    from .models import Source
    from .text import read

    where = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    named = ((original, original_revision), (patched, patched_revision))
    one, other = (Source(name=n, revision=r, **where).model() for n, r in named)  # type: ignore[arg-type]  # by name
    result = ap.compare(
        one,
        other,
        out,
        parts=_words(parts),
        text=None if text is None else read(text, "--text"),
        text_name=None if text is None else text.name,
        command=cli_specs.spelled(context),
        say=voice.aside,
        lengths=None if lengths is None else [_number(word) for word in _words(lengths) or ()],
        documents=documents,
        retrieval_task=task,
        retrieval_samples=samples,
    )
    voice.answer(result, {"folder": result.folder, **result.metrics})


def add(app: typer.Typer) -> None:
    """Add the command to an app."""
    command(
        app,
        "compare",
        "attnpatch compare embedded out",
        "attnpatch compare embedded out --parts loss,decoding --lengths 256,512 --out outputs/compare",
        go_on="the same command goes on with what OUT lacks.",
    )(compare)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _number(word: str) -> int:
    from ..errors import AttnPatchError

    if not word.isdecimal():
        raise AttnPatchError(f"--lengths: {word!r} is no number of tokens; wanted numbers such as 512,1024.")
    return int(word)
