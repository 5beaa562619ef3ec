"""ReRoPE: rectified distances."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError
from ..functional.spans import Clipped
from ..patch import Patch, Proposal
from ..spans.proposal import check_fields, spanned, target_length, trained_length, within


@dataclass(frozen=True, kw_only=True)
class ReRope(Patch):
    """Read longer texts without training: distances beyond a window count as the window (ReRoPE, Su, 2023).

    With ``leak`` they grow on, by that much for each token (Leaky ReRoPE, the same source). Flash calls are merged by
    log-sum-exp. Queries before ``start`` attend as they always did, so that inputs within the trained length have the
    same logits, bit for bit. Positions are counted from a row's first token that is not padding. Stock transformers
    cannot express it: checkpoints are of this package's model type.

    Args:
        window: tokens that are seen at their distance; None for half of the trained length.
        leak: growth of distance beyond it, in [0, 1); None for 0, or for what ends at the trained length where
            ``target`` is given.
        target: length to reach, in tokens, by a leak; None for any length.
        start: first query that is treated so; None for the trained length.
        trained: tokens that the model handles by itself; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is the former.

    Raises:
        UnsupportedArchitecture: no rotary layer looks back at everything, or its rotation is not known.
        AttnPatchError: lengths that do not fit each other.
    """

    name: ClassVar[str] = "re_rope"
    wraps: ClassVar[bool] = True

    window: int | None = None
    leak: float | None = None
    target: int | None = None
    start: int | None = None
    trained: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        lengths = {"window": self.window, "target": self.target, "start": self.start, "trained": self.trained}
        check_fields(self, self.backend, **lengths)
        number = isinstance(self.leak, (int, float)) and not isinstance(self.leak, bool)
        if self.leak is not None and not (number and 0 <= self.leak < 1):
            raise AttnPatchError(f"re_rope: leak is {self.leak!r}; it must be a number from 0 to below 1.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which modules would see which distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        window = trained // 2 if self.window is None else self.window
        within(self, trained - 1, window=window)
        leak = 0.0 if self.leak is None else float(self.leak)
        if self.target is not None:
            target = target_length(self, self.target, trained)
            most = (trained - 1 - window) / (target - 1 - window)
            leak = most if self.leak is None else leak
            if leak > most:
                raise AttnPatchError(
                    f"re_rope: leak {leak:g} makes distances beyond the {trained} tokens that the model knows before "
                    f"{target} tokens are reached; take at most {most:g}."
                )
        start = trained if self.start is None else self.start
        chosen = dataclasses.replace(self, window=window, leak=leak, start=start, trained=trained)
        span = Clipped(window, leak, max(window, start))
        note = f"distances beyond {window} tokens grow by {leak:g}" if leak else f"distances end at {window}"
        return spanned(chosen, model, anatomy, span, Clipped(3, leak, 4), [note])
