"""ReRoPE: distances clipped at a window."""

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
    """Rectified rotary positions (ReRoPE, Su, 2023): longer context without training; distances end at a window.

    With ``leak`` they keep growing, by that much for each token (Leaky ReRoPE, same source). Flash calls are merged by
    log-sum-exp. Queries before ``start`` attend as before, so that inputs within the trained length give the same
    logits, bit for bit. Positions are counted from the first token of a row that is not padding. Stock transformers
    cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        window: distances below it are unchanged; None takes half of the trained length.
        leak: growth of distance per token beyond the window, in [0, 1); None takes 0, or with ``target_length`` what
            reaches the trained length there.
        target_length: length to reach with a leak, in tokens; None for any length.
        factor: the same as a multiple of the trained length; give one of the two.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
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
        """Return the edits that remap the distances; see :meth:`Patch.propose`."""
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
