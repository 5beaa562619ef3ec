"""Attention sinks with a window: endless text in a cache of fixed size."""

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
    """Attention sinks with a window (StreamingLLM, 2309.17453, 3.2): endless text in a cache of fixed size.

    No longer context: a token sees ``num_sinks + window`` others and nothing in between. What it gives is fluency and a
    cache of fixed size however long the text grows: ``generate`` and forwards with a growing cache keep no more than
    the sinks, the longest padding before them, and the window, while caches of other kinds stay as they are. Inputs
    within ``num_sinks + window`` have the same logits, bit for bit. Assisted decoding, which rolls a cache back, is
    refused once tokens were let go. Angles are transformers' own, in fp32, which are off by a thousandth of a turn
    beyond some 10^5 tokens. Stock transformers cannot express it: checkpoints are of this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        num_sinks: first tokens that stay.
        window: last tokens that are seen, the query among them; None for the rest of the trained length.
        trained_length: tokens that the model handles by itself; None reads the config.
        backend: ``sdpa``, merged flash calls; ``eager``, dense, with attention weights; ``auto`` is the former.

    Raises:
        UnsupportedArchitecture: no rotary layer looks back at everything, or its rotation is not known.
        AttnPatchError: lengths that do not fit each other.
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
        """Say which modules would see which distances; see :meth:`Patch.propose`."""
        trained = trained_length(self, anatomy)
        within(self, trained - 2, num_sinks=self.num_sinks)
        window = trained - self.num_sinks if self.window is None else self.window
        within(self, trained, **{"num_sinks and window together,": self.num_sinks + window})
        chosen = changed(self, window=window, trained_length=trained)
        note = f"the first {self.num_sinks} tokens and the last {window}: no longer context, but a cache of fixed size"
        return spanned(chosen, model, anatomy, Sinks(self.num_sinks, window), Sinks(2, 3), [note])
