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
    """Dual chunk attention (2402.17463, 3): longer context without training, by positions within and between chunks.

    Within its own chunk a token sees true distances. In the previous chunk distances are exact for the first ``local``
    tokens and then stay at ``chunk + local``, the largest one, which all earlier chunks have as well. So every distance
    is one that the model knows, and order among far chunks is lost. Flash calls are merged by log-sum-exp. Queries
    before ``start`` attend as before, so that inputs within the trained length give the same logits, bit for bit.
    Positions are counted from the first token of a row that is not padding. Stock transformers cannot express it:
    checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        chunk: tokens in a chunk; None takes three quarters of the trained length, as in the paper.
        local: tokens for which the distance to the previous chunk is exact; None takes the rest of the trained length.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
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
        """Return the edits that remap the distances; see :meth:`Patch.propose`."""
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
