"""Patches and writes a checkpoint: what it contains besides the model is carried over, and the result is read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from . import models as cli_models

if TYPE_CHECKING:
    from ..report import Report
    from ..rewriting.rereading import Marks


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

        _refuse_quantized(source)
        self.source = source
        self.model, info = source.model_with_info()
        self.tokenizer = source.tokenizer()
        cli_models.check_numbers(self.model, source.name)
        self.weights, self.kept = weights_of(source.location, local_files_only=True, **source.where), Kept(self.model)
        self.strange = strange_in(self.model, self.weights, info["unexpected_keys"])

    def save(self, report: Report, folder: Path, command: str, max_shard_size: str) -> tuple[str, ...]:
        """Write the model with its tokenizer and the tensors that no patch has touched.

        Args:
            report: of the patch.
            folder: where to, empty.
            command: as a reader would type it.
            max_shard_size: of a file of weights, such as ``5GB``.

        Returns:
            Sentences on what is otherwise than it was.

        Raises:
            AttnPatchError: it cannot be written, or a tensor was changed by nobody's wish.
        """
        from ..rewriting.carrying import carry

        fitted = report.lengthen(self.tokenizer) if self.tokenizer is not None else None
        cli_models.save(self.model, self.tokenizer, folder, command, max_shard_size)
        replaced = self.kept.replaced(self.model)
        with cli_models.writing():
            asked = self.source.dtype
            said = carry(self.weights, folder, replaced, self.strange, self.source.name, asked=asked)
        return (*said, *([fitted] if fitted else ()))

    def release(self) -> Marks:
        """Free the model, so that the written one can be read again; return what that must equal."""
        from ..rewriting.rereading import marks_of

        found = marks_of(self.model)
        del self.model, self.kept
        return found


def reread(folder: Path, wanted: Marks, source: cli_models.Source) -> None:
    """Read a checkpoint that was just written, and compare it with the model in memory.

    Raises:
        AttnPatchError: it comes back as something else.
    """
    from ..checkpoint import load
    from ..rewriting.rereading import check_reread, marks_of

    check_reread(wanted, marks_of(load(folder, dtype="auto", trust_remote_code=source.trust_remote_code)))


def _refuse_quantized(source: cli_models.Source) -> None:
    from ..errors import AttnPatchError

    found = getattr(source.config(), "quantization_config", None)
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
        raise AttnPatchError(
            f"{source.name}: is quantized ({getattr(method, 'value', method)}), and what is patched here would be "
            "written dequantized; patch the full-precision checkpoint first, then quantize the result."
        )
