"""Jet-Long: a near window and a far branch whose groups grow with the text."""

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
    """Jet-Long (2607.07740): longer texts without training, by a window and, beyond it, groups that grow with the text.

    As the authors' code has it: distances up to ``window`` as they are, others i // G - j // G, one temperature, G =
    ceil(length / trained). Theirs takes the length of the text so far, so that a token in the cache was read under
    another G than a token after it; here each query takes G from its own position. That is the same for the last query,
    leaves every query within the trained length as it was (bit for bit), and makes decoding with a cache equal the
    whole forward. Flash calls over disjoint pieces are merged by log-sum-exp; the authors' A + B - C is not needed.
    While gradients are kept, keys are kept once for each G. Stock transformers cannot express it: checkpoints are of
    this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        window: largest distance that is as it is; None for a quarter of the trained length, at most 2048, which
            the authors have for a model trained at 32768.
        trained_length: tokens that the model handles by itself; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is the former.

    Raises:
        UnsupportedArchitecture: no rotary layer looks back at everything, or its rotation is not known.
        AttnPatchError: lengths that do not fit each other.
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
        """Say which modules would see which distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        window = min(trained // 4, 2048) if self.window is None else self.window
        within(self, trained - 1, window=window)
        chosen = changed(self, window=window, trained_length=trained)
        note = f"beyond {window} tokens, as many share a position as {trained} goes into the query's, and one"
        return spanned(chosen, model, anatomy, Bifocal(window, trained), Bifocal(2, 4), [note])
