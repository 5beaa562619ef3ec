"""Calibration text for the command line: windows spread evenly over a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..patch import Patch
    from ..report import Report
    from .models import Source


_LARGEST = 1 << 30  # bytes of text to be tokenised at once


def with_text(patches: Sequence[Patch], file: Path | None, source: Source, sequences: int, length: int) -> list[Patch]:
    """Pass the text to the patches that are fitted to text.

    Args:
        patches: as the command line spelled them.
        file: a text file, or JSON lines with a field ``text``; ``self`` for text that the model writes; None leaves the
            patches as they are.
        source: the model, whose tokenizer is used.
        sequences: windows, spread evenly over the text.
        length: tokens in a window.

    Raises:
        AttnPatchError: the file is unreadable or too short, no patch takes text, or the model has no tokenizer.
    """
    if file is None:
        return list(patches)
    from ..errors import AttnPatchError

    takes = [any(field.name == "calibration" for field in dataclasses.fields(patch)) for patch in patches]
    if not any(takes):
        raise AttnPatchError("--calibration: none of the patches is fitted on text; leave it out.")
    if str(file) == "self" and not file.exists():
        from ..heads.own_text import OwnText

        own = OwnText(sequences=sequences, length=length)
        return [dataclasses.replace(p, calibration=own) if t else p for p, t in zip(patches, takes, strict=True)]  # type: ignore[call-arg]  # a patch with the field
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise AttnPatchError(f"--calibration: {source.name} has no tokenizer to read {file} with; add one to it.")
    ids = _windows(read(file), tokenizer, sequences, length, file)
    return [dataclasses.replace(p, calibration=ids) if t else p for p, t in zip(patches, takes, strict=True)]  # type: ignore[call-arg]  # a patch with the field


def read(file: Path, option: str = "--calibration") -> list[str]:
    """Return the documents of a text file (one) or of JSON lines (one each).

    Raises:
        AttnPatchError: no such file, not UTF-8, or a line that is no JSON with a field ``text``.
    """
    from ..errors import AttnPatchError
    from ..schema import from_json, text_of

    if not file.is_file():
        raise AttnPatchError(f"{option} {file}: no such file; wanted text, or JSON lines with a field text.")
    try:
        text = text_of(file, _LARGEST)
        if file.suffix != ".jsonl":
            return [text]
        # by newlines alone: JSON may hold other separators of lines, as they are, inside a text
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [_document(from_json(line, f"{file}:{n}", finite=False), f"{file}:{n}") for n, line in lines]
    except AttnPatchError as error:
        problem = str(error).rstrip(".")
        raise AttnPatchError(f"{option} {problem}; wanted UTF-8 text, or JSON lines with text.") from error


def _document(row: Any, where: str) -> str:
    from ..errors import AttnPatchError
    from ..schema import brief

    found = row.get("text") if isinstance(row, Mapping) else row
    if not isinstance(row, Mapping) or not isinstance(found, str):
        raise AttnPatchError(f"{where}: its text is {brief(found)}.")
    return found


def check_figure(path: Path) -> None:
    """Refuse a figure that cannot be written, before the work that it shows.

    Raises:
        AttnPatchError: no folder to write it in, or an ending that names no format of matplotlib.
        MissingExtra: matplotlib is not installed.
    """
    from ..errors import AttnPatchError
    from ..plotting import import_pyplot

    known = import_pyplot("--damage").FigureCanvasBase.get_supported_filetypes()
    if not path.parent.is_dir() or path.is_dir():
        raise AttnPatchError(f"--damage {path}: wanted a file in a folder that is there; make the folder first.")
    if path.suffix.removeprefix(".").lower() not in known:
        raise AttnPatchError(f"--damage {path}: no format of matplotlib; let it end in .png, .pdf or .svg.")


def draw(report: Report, path: Path) -> None:
    """Save the damage figure of a report.

    Raises:
        AttnPatchError: no patch measured damage.
        MissingExtra: matplotlib is not installed.
    """
    from ..errors import AttnPatchError

    if report.damage is None:
        raise AttnPatchError("--damage: nothing was measured; grouped_query with method=refined, say, does.")
    report.damage.save_figure(path)


def _windows(documents: Sequence[str], tokenizer: Any, sequences: int, length: int, file: Path) -> Tensor:
    import torch

    from ..errors import AttnPatchError

    tokens = [torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64) for text in documents]
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *tokens])  # a file may hold no document at all
    found = len(ids) // length
    if found < sequences:
        raise AttnPatchError(
            f"--calibration {file}: {len(ids)} tokens are {found} windows of {length}, wanted {sequences}; give more "
            "text, or lower --sequences or --length."
        )
    windows = ids[: found * length].view(found, length)
    return windows[torch.arange(sequences) * found // sequences]
