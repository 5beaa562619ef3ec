"""Dual chunk attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..functional.spans import Chunked
from ..patch import Patch, Proposal, changed
from ..spans.proposal import check_fields, spanned, trained_length, within


@dataclass(frozen=True, kw_only=True)
class DualChunk(Patch):
    """Dual chunk attention (2402.17463, 3): longer texts without training, by positions within chunks and between them.

    A token sees its own chunk at its distances; the chunk before it exactly for the first ``local`` tokens of its own,
    then at the largest distance, ``chunk + local``, as all chunks before that. Any length has distances that the model
    knows; order among far chunks is lost. Flash calls are merged by log-sum-exp. Queries before ``start`` attend as
    they always did, so that inputs within the trained length have the same logits, bit for bit. Positions are counted
    from a row's first token that is not padding. Stock transformers cannot express it: checkpoints are of this
    package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        chunk: tokens of a chunk; None for three quarters of the trained length, as the paper has it.
        local: tokens for which the distance to the chunk before is exact; None for the rest of the trained length.
        start: first query that is treated so; None for the trained length.
        trained_length: tokens that the model handles by itself; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is the former.

    Raises:
        UnsupportedArchitecture: no rotary layer looks back at everything, or its rotation is not known.
        AttnPatchError: lengths that do not fit each other.
    """

    name: ClassVar[str] = "dual_chunk"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 1
    experimental: ClassVar[bool] = True
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("factor", "target_length"), "it reaches any length; leave it out"
    )

    chunk: int | None = None
    local: int | None = None
    start: int | None = None
    trained_length: int | None = None
    backend: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        lengths = {"chunk": self.chunk, "start": self.start, "trained_length": self.trained_length}
        check_fields(self, self.backend, local=self.local, **lengths)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which modules would see which distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        chunk = trained * 3 // 4 if self.chunk is None else self.chunk
        within(self, trained - 1, chunk=chunk)
        local = max(1, trained - 1 - chunk) if self.local is None else self.local
        within(self, trained - 1, **{"chunk and local together,": chunk + local})
        start = trained if self.start is None else self.start
        chosen = changed(self, chunk=chunk, local=local, start=start, trained_length=trained)
        span = Chunked(chunk, local, max(chunk, start))
        note = f"chunks of {chunk} tokens, the one before exact for {local}, all others at {chunk + local}"
        return spanned(chosen, model, anatomy, span, Chunked(3, 1, 3), [note])
