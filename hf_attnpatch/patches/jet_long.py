"""Jet-Long: true distances in a near window, grouped positions beyond it, with groups that grow with the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..functional.spans import Bifocal
from ..patch import Patch, Proposal, changed
from ..spans.proposal import check_fields, spanned, trained_length, within


@dataclass(frozen=True, kw_only=True)
class JetLong(Patch):
    """Jet-Long (2607.07740): longer context without training, by a window and groups that grow with the text.

    Distances up to ``window`` are unchanged; others are i // G - j // G with G = ceil(length / trained), as in the
    authors' code, at one temperature. Their G follows the length of the text so far, so that a cached token was read
    with another G than a later one. Here each query takes G from its own position. That is the same for the last query,
    leaves queries within the trained length unchanged (bit for bit), and makes cached decoding equal the full forward.
    Flash calls over disjoint pieces are merged by log-sum-exp; the authors' A + B - C is not needed. With gradients,
    keys are kept once for each G. Stock transformers cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        window: largest distance that is unchanged; None takes a quarter of the trained length, at most 2048, the
            authors' value for a model trained at 32768.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """

    name: ClassVar[str] = "jet_long"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 1
    experimental: ClassVar[bool] = True
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("factor", "target_length"), "it reaches any length; leave it out"
    )

    window: int | None = None
    trained_length: int | None = None
    backend: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, self.backend, window=self.window, trained_length=self.trained_length)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that remap the distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        window = min(trained // 4, 2048) if self.window is None else self.window
        within(self, trained - 1, window=window)
        chosen = changed(self, window=window, trained_length=trained)
        note = f"beyond {window} tokens, groups of G = query position // {trained} + 1 tokens share a position"
        return spanned(chosen, model, anatomy, Bifocal(window, trained), Bifocal(2, 4), [note])
