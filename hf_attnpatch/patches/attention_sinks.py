"""Attention sinks with a sliding window: unbounded text in a cache of fixed size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..functional.spans import Sinks
from ..patch import Patch, Proposal, changed
from ..spans.proposal import check_fields, spanned, trained_length, within


@dataclass(frozen=True, kw_only=True)
class AttentionSinks(Patch):
    """Attention sinks with a window (StreamingLLM, 2309.17453, 3.2): unbounded text in a cache of fixed size.

    This does not extend the context: a token sees ``num_sinks + window`` others and nothing in between. The gain is
    fluent text of any length in a cache of fixed size. ``generate``, and forwards with a dynamic cache, keep only the
    sinks, the longest padding before them, and the window; other kinds of caches are unchanged. Inputs of at most
    ``num_sinks + window`` tokens give the same logits, bit for bit. Assisted decoding, which rolls a cache back, is
    refused once tokens were evicted. Angles are transformers' own, in fp32, which are wrong by a thousandth of a turn
    beyond about 10^5 tokens. Stock transformers cannot express it: checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        num_sinks: number of first tokens that are always kept.
        window: number of last tokens that a query sees, itself included; None takes the rest of the trained length.
        trained_length: context that the model was trained on, in tokens; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is ``sdpa``.

    Raises:
        UnsupportedArchitecture: no rotary layer attends to the whole past, or its rotation is unknown.
        AttnPatchError: the lengths contradict each other.
    """

    name: ClassVar[str] = "attention_sinks"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 1
    experimental: ClassVar[bool] = True
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(("factor", "target_length"), "it gives no longer context")

    num_sinks: int = 4
    window: int | None = None
    trained_length: int | None = None
    backend: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        check_fields(
            self, self.backend, num_sinks=self.num_sinks, window=self.window, trained_length=self.trained_length
        )

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that remap the distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        within(self, trained - 2, num_sinks=self.num_sinks)
        window = trained - self.num_sinks if self.window is None else self.window
        within(self, trained, **{"num_sinks and window together,": self.num_sinks + window})
        chosen = changed(self, window=window, trained_length=trained)
        note = f"the first {self.num_sinks} tokens and the last {window}: no longer context, but a cache of fixed size"
        return spanned(chosen, model, anatomy, Sinks(self.num_sinks, window), Sinks(2, 3), [note])
