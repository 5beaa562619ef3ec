"""Self-Extend: groups of far tokens share a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError
from ..functional.spans import Grouped
from ..patch import Patch, Proposal, changed
from ..rope.fields import check_reach
from ..spans.proposal import check_fields, spanned, target_length, trained_length, within


@dataclass(frozen=True, kw_only=True)
class SelfExtend(Patch):
    """Self-Extend (2401.01325, 3): longer context without training; beyond a window, ``group`` tokens share a position.

    A token sees the ``window`` tokens before it at their true distance and those further back at i // G - j // G + w -
    w // G, so that no distance is new to the model. Flash calls over disjoint pieces are merged by log-sum-exp: linear
    memory, and about the time of plain attention. Queries before ``start`` attend as before, so that inputs within the
    trained length give the same logits, bit for bit; the paper has ``start=0``. Positions are counted from the first
    token of a row that is not padding. Keys stay in the cache as the model rotated them. Stock transformers cannot
    express it: checkpoints have this package's model type.

    Args:
        window: distances below it are unchanged; None takes half of the trained length.
        group: tokens that share a position beyond the window; None takes the smallest that reaches ``target_length``.
        target_length: length to reach, in tokens; None takes four times the trained length.
        factor: the same as a multiple of the trained length; give one of the two.
        start: first query whose distances are remapped; None takes the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """

    name: ClassVar[str] = "self_extend"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 1

    window: int | None = None
    group: int | None = None
    target_length: int | None = None
    factor: float | None = None
    start: int | None = None
    trained_length: int | None = None
    backend: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        lengths = {"window": self.window, "group": self.group, "start": self.start}
        check_fields(self, self.backend, trained_length=self.trained_length, **lengths)
        check_reach(self.factor, self.target_length)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that remap the distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        given = target_length(self, trained)
        target = 4 * trained if given is None else given
        window = trained // 2 if self.window is None else self.window
        within(self, trained, window=window)
        group = _reaching(target, window, trained) if self.group is None else self.group
        reach = _most(target, window, group)
        if given is not None and reach >= trained:
            raise AttnPatchError(
                f"self_extend: at {target} tokens, window {window} and group {group} make distances up to {reach}, and "
                f"the model knows {trained}; take a larger group or a smaller window."
            )
        start = trained if self.start is None else self.start
        lengths = {"target_length": given, "factor": None, "start": start, "trained_length": trained}
        chosen = changed(self, window=window, group=group, **lengths)
        span = Grouped(window, group, max(window, start))
        note = f"beyond {window} tokens, {group} share a position: distances below {trained} up to "
        longest = (trained - window - 1 + window // group) * group
        return spanned(chosen, model, anatomy, span, Grouped(3, 2, 4), [f"{note}{longest} tokens"])


def _most(length: int, window: int, group: int) -> int:
    return (length - 1) // group + window - window // group


def _reaching(target: int, window: int, trained: int) -> int:
    """Return the smallest group with which all distances within ``target`` are known to the model.

    With a = target - 1 and c = trained - window, a // g - window // g < c is wanted. The left side is (a - window) // g
    or one more, so that no g up to (a - window) // c will do; beyond the window its second term is 0, so that
    a // c + 1 does. In between, steps lead to the next g at which a quotient changes.
    """
    last, room = target - 1, trained - window
    if room < 1:
        raise AttnPatchError(
            f"self_extend: no group reaches {target} tokens with a window of {window}; take a smaller."
        )
    group = max(2, (last - window) // room + 1)
    while group <= window and _most(target, window, group) >= trained:
        group = min(last // (last // group), window // (window // group)) + 1
    return group if group <= window else max(group, last // room + 1)
