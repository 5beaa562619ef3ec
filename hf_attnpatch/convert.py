"""``convert``: a checkpoint patched from folder to folder, also where it is larger than memory; ``attnpatch apply``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import api
from .aside import lying_in
from .commands.models import Source, size_of
from .commands.place import check_room
from .commands.replacing import aside_of, replacing
from .commands.rewriting import Rewriting, job_of, reread
from .patch import Patch
from .report import Report
from .showing import Shown


@dataclass(frozen=True)
class Converted(Shown):
    """What was written.

    Attributes:
        saved: the folder.
        tokenizer: whether the checkpoint has one.
        notes: what is otherwise than it was beside what patches do, and what was carried over.
        report: what the patches did and found, as data.
        text: the same as a table.
    """

    saved: Path
    tokenizer: bool
    notes: tuple[str, ...]
    report: Mapping[str, Any]
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        mine = {"saved": str(self.saved), "tokenizer": self.tokenizer, "notes": list(self.notes)}
        return {**mine, **self.report}

    def _in_short(self) -> str:
        return f"saved {self.saved}"

    def __str__(self) -> str:
        without = "" if self.tokenizer else " (no tokenizer in the source)"
        return "\n".join([self.text, *self.notes, f"saved {self.saved}{without}"])


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *patches: Patch,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Patch a checkpoint and save it, with its tokenizer; ``out`` appears whole or not at all.

    Experimental: its arguments may get other names or defaults between minor versions.

    Files of weights are mapped, not read into memory. What a patch replaces is made module by module and laid into
    files; what it does not is copied from file to file. So the memory that this takes is that of a module or two, and
    statistics of one layer where heads are fitted to text, however large the checkpoint is. A run that was killed is
    gone on from by the same call.

    Args:
        source: folder or hub repository.
        out: folder for the patched checkpoint.
        patches: in order, as for ``apply``.
        overwrite: replace a checkpoint that is there.
        max_shard_size: of a file of weights, such as ``5GB``; by default the files are those of the source.
        dtype: ``auto`` for the checkpoint's own; another one is written anew by transformers, and takes memory.
        device: where the model is loaded.
        revision: branch, tag or commit of a repository of the Hub.
        trust_remote_code: whether code in the checkpoint may run.

    Raises:
        AttnPatchError: see ``apply``; or something is in the way at ``out``, or it cannot be written.
    """
    place = {"dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    model = Source(name=os.fspath(source), **place)  # type: ignore[arg-type]  # options by name
    what = [patch.to_record() for patch in patches]
    job = job_of({"source": model.name, **place, "max_shard_size": max_shard_size, "patches": what})
    inputs = {"source": model.name}
    return written(model, Path(out), patches, overwrite=overwrite, size=max_shard_size, inputs=inputs, job=job)


def written(
    source: Source,
    out: Path,
    patches: Sequence[Patch],
    *,
    overwrite: bool,
    size: str | None,
    inputs: Mapping[str, str | Path | None],
    job: str,
    command: str | None = None,
    see: Callable[[Report], None] = lambda _: None,
) -> Converted:
    """Do it.

    Args:
        source: of the checkpoint.
        out: where it is wanted.
        patches: in order.
        overwrite: whether a checkpoint that is there may be replaced.
        size: of a file of weights; None keeps the files there were.
        inputs: what is read to make it; see :func:`.commands.place.check_target`.
        job: what tells this call from others; see :func:`.commands.replacing.replacing`.
        command: as a reader would type it, for the record; None for a script.
        see: is shown the report, which holds what was replaced.
    """
    with replacing(out, overwrite, inputs, job) as folder:
        work = Rewriting(source)
        check_room(out, size_of(work.model))
        with lying_in(aside_of(folder), work.fingerprint):
            report = api.apply(work.model, *patches)
        see(report)
        notes = work.save(report, folder, command, size)
        data, text = report.to_dict(), str(report)
        del report  # which holds what was replaced
        reread(folder, work.release(), source)
    return Converted(out, work.tokenizer is not None, notes, data, text)
