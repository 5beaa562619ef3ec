"""ReRoPE: rectified distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError
from ..functional.spans import Clipped
from ..patch import Patch, Proposal, changed
from ..rope.fields import check_reach
from ..spans.proposal import check_fields, spanned, target_length, trained_length, within


@dataclass(frozen=True, kw_only=True)
class ReRope(Patch):
    """Rectified rotary positions (ReRoPE, Su, 2023): longer texts without training, distances end at a window.

    With ``leak`` they grow on, by that much for each token (Leaky ReRoPE, the same source). Flash calls are merged by
    log-sum-exp. Queries before ``start`` attend as they always did, so that inputs within the trained length have the
    same logits, bit for bit. Positions are counted from a row's first token that is not padding. Stock transformers
    cannot express it: checkpoints are of this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        window: tokens that are seen at their distance; None for half of the trained length.
        leak: growth of distance beyond it, in [0, 1); None for 0, or for what ends at the trained length where
            ``target_length`` is given.
        target_length: length to reach, in tokens, by a leak; None for any length.
        factor: the same as a multiple of the trained length; give one of the two.
        start: first query that is treated so; None for the trained length.
        trained_length: tokens that the model handles by itself; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is the former.

    Raises:
        UnsupportedArchitecture: no rotary layer looks back at everything, or its rotation is not known.
        AttnPatchError: lengths that do not fit each other.
    """

    name: ClassVar[str] = "re_rope"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 1
    experimental: ClassVar[bool] = True

    window: int | None = None
    leak: float | None = None
    target_length: int | None = None
    factor: float | None = None
    start: int | None = None
    trained_length: int | None = None
    backend: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        lengths = {"window": self.window, "start": self.start, "trained_length": self.trained_length}
        check_fields(self, self.backend, **lengths)
        check_reach(self.factor, self.target_length)
        number = isinstance(self.leak, (int, float)) and not isinstance(self.leak, bool)
        if self.leak is not None and not (number and 0 <= self.leak < 1):
            raise AttnPatchError(f"re_rope: leak is {self.leak!r}; it must be a number from 0 to below 1.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which modules would see which distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        window = trained // 2 if self.window is None else self.window
        within(self, trained - 1, window=window)
        leak = 0.0 if self.leak is None else float(self.leak)
        target = target_length(self, trained)
        if target is not None:
            most = (trained - 1 - window) / (target - 1 - window)
            leak = most if self.leak is None else leak
            if leak > most:
                raise AttnPatchError(
                    f"re_rope: leak {leak:g} makes distances beyond the {trained} tokens that the model knows before "
                    f"{target} tokens are reached; take at most {most:g}."
                )
        start = trained if self.start is None else self.start
        lengths = {"target_length": target, "factor": None, "start": start, "trained_length": trained}
        chosen = changed(self, window=window, leak=leak, **lengths)
        span = Clipped(window, leak, max(window, start))
        note = f"distances beyond {window} tokens grow by {leak:g}" if leak else f"distances end at {window}"
        return spanned(chosen, model, anatomy, span, Clipped(3, leak, 4), [note])
