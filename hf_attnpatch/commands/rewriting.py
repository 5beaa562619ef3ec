"""Patches and writes a checkpoint: what it contains besides the model is carried over, and the result is read again."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models as cli_models
from .options import SHARD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report import Report
    from ..rewriting.rereading import Marks


_NO_MATTER = ("overwrite", "damage", "as_json", "quiet", "json")  # parameters that change nothing of what is written


class Rewriting:
    """A checkpoint, from before its patch until it is written.

    Args:
        source: of the checkpoint.

    Raises:
        AttnPatchError: it is quantized, cannot be loaded, lacks a tensor, or holds what is no number.
    """

    def __init__(self, source: cli_models.Source) -> None:
        from ..rewriting.carrying import Kept, strange_in
        from ..rewriting.files import weights_of
        from ..rewriting.shards import shards_of

        _refuse_quantized(source)
        self.source = source
        self.model, info = _loaded(source)
        self.tokenizer = source.tokenizer()
        cli_models.check_numbers(self.model, source.name)
        self.weights, self.kept = weights_of(source.location, local_files_only=True, **source.where), Kept(self.model)
        self.strange = strange_in(self.model, self.weights, info["unexpected_keys"])
        asked = f"--dtype {source.dtype} asks for all of them" if source.dtype != "auto" else None
        self.shards = asked or shards_of(self.model, self.weights, self.strange, source.name)

    @property
    def fingerprint(self) -> str:
        """What tells what was read from others: which files, as they are, and the config; asked before any patch."""
        files = {*self.weights.files.values()}
        found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return json.dumps([sorted(found), self.source.dtype, self.model.config.to_json_string()])

    def save(self, report: Report, folder: Path, command: str | None, max_shard_size: str | None) -> tuple[str, ...]:
        """Write the model as it is now, with its tokenizer and the tensors that no patch has touched.

        Where the files' names are those of the class, the new files are made from the old ones. Elsewhere transformers
        writes all, and what it wrote is held against the old files.

        Args:
            report: of the patch.
            folder: where to, empty.
            command: as a reader would type it; None for a script.
            max_shard_size: of a file of weights, such as ``5GB``; None keeps the files there were, where they can be.

        Returns:
            Sentences on what is otherwise than it was.

        Raises:
            AttnPatchError: it cannot be written, or a tensor was changed by nobody's wish.
        """
        from ..rewriting.carrying import carry

        fitted = report.lengthen(self.tokenizer) if self.tokenizer is not None else None
        with cli_models.writing():
            _clear(folder, keep=() if isinstance(self.shards, str) else (".safetensors",))
            if isinstance(self.shards, str):
                size = max_shard_size or SHARD
                cli_models.save(self.model, self.tokenizer, folder, command, max_shard_size=size)
                replaced, asked = self.kept.replaced(self.model), self.source.dtype
                said = carry(self.weights, folder, replaced, self.strange, self.source.name, asked=asked)
                said = (f"all weights were written anew: {self.shards}", *said)
            else:
                cli_models.save(self.model, self.tokenizer, folder, command, state_dict={})
                said = self.shards.write(self.model, folder, max_shard_size)
        return (*said, *([fitted] if fitted else ()))

    def release(self) -> tuple[Marks, frozenset[str]]:
        """Let go of the model, so that what was written can be read again.

        Returns:
            What it has to be, and the names of those tensors of which some numbers are enough.
        """
        from ..rewriting.rereading import marks_of

        copied = frozenset[str]() if isinstance(self.shards, str) else frozenset(self.kept.still(self.model))
        found = marks_of(self.model, copied)
        del self.model, self.kept, self.shards
        return found, copied


def job_of(parameters: Mapping[str, object]) -> str:
    """Return what tells a call of a command from others: its parameters, where it was called, and the release."""
    from .. import __version__

    given = {name: str(value) for name, value in parameters.items() if name not in _NO_MATTER}
    return json.dumps([__version__, str(Path.cwd()), given], sort_keys=True)


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    """Remove what a run that was killed has left in the folder, but for files that are held to what they should be."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.suffix not in keep:
            entry.unlink()


def reread(folder: Path, wanted: tuple[Marks, frozenset[str]], source: cli_models.Source) -> None:
    """Read a checkpoint that was just written, and hold it to the model in memory.

    Args:
        folder: that holds it.
        wanted: as :meth:`Rewriting.release` gives it.
        source: that it was made from.

    Raises:
        AttnPatchError: it comes back as something else.
    """
    from ..checkpoint import load
    from ..rewriting.rereading import check_reread, marks_of

    marks, copied = wanted
    check_reread(marks, marks_of(load(folder, dtype="auto", trust_remote_code=source.trust_remote_code), copied))


def _loaded(source: cli_models.Source) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a model; name the file that is damaged, where that is why it cannot be, which transformers does not."""
    from ..errors import AttnPatchError
    from ..rewriting.files import weights_of
    from ..rewriting.shards import check_files

    try:
        return source.model_with_info()
    except AttnPatchError:
        with contextlib.suppress(OSError, KeyError):  # no weights there: what was said says it
            check_files(weights_of(source.location, local_files_only=True, **source.where))
        raise


def _refuse_quantized(source: cli_models.Source) -> None:
    from ..errors import AttnPatchError

    found = getattr(source.config(), "quantization_config", None)
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
        raise AttnPatchError(
            f"{source.name}: is quantized ({getattr(method, 'value', method)}), and what is patched here would be "
            "written dequantized; patch the full-precision checkpoint first, then quantize the result."
        )
