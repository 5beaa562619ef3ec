"""Replaces a model's positions by the sinusoid of Attention Is All You Need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError
from ..modules.added import SinusoidalPositions
from ..patch import Patch, Proposal
from ..positions.adding import adding, check_adding
from ..positions.removal import ADDED, check_blind, removal, removed
from ..rope.fields import check_number


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Patch):
    """Sinusoidal absolute positions (Attention Is All You Need, 1706.03762, 3.5), added to the token embeddings.

    PE(p, 2i) = sin(p / theta^(2i/d)) and PE(p, 2i+1) the cosine, alternating as in the paper, computed for any
    position: no table and no longest length. Positions are ``position_ids`` if passed, otherwise counted from the
        attention mask, so
    that left padding changes nothing. The sinusoid is added to the output of the token embedding, before anything else
    that the model does to it (Gemma's factor, BERT's norm). The old positions are removed. A model that was not trained
    with it has to be fine-tuned: the sinusoid is as large as the paper's embeddings, which are scaled by the root of
    the width, and most models' are far smaller; ``amplitude`` makes it smaller, ``embedding_scale="paper"`` scales the
    embeddings. Stock transformers cannot express the result, so checkpoints have this package's model type.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        theta: base of the wavelengths.
        amplitude: factor on the sinusoid.
        embedding_scale: factor on the token embeddings, or ``"paper"`` for the root of their width.

    Raises:
        UnsupportedArchitecture: the old positions cannot be removed, or the model needs token ids beside embeddings.
        AttnPatchError: an argument out of range.
    """

    name: ClassVar[str] = "sinusoidal"
    changes_positions: ClassVar[bool] = True
    experimental: ClassVar[bool] = True

    theta: float = 10000.0
    amplitude: float = 1.0
    embedding_scale: float | Literal["paper"] = 1.0
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("theta", self.theta)
        check_number("amplitude", self.amplitude, at_least=0)
        if isinstance(self.embedding_scale, str):
            if self.embedding_scale != "paper":
                raise AttnPatchError(f"embedding_scale is {self.embedding_scale!r}; give a number above 0, or 'paper'.")
        else:
            check_number("embedding_scale", self.embedding_scale)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that replace the positions; see :meth:`Patch.propose`."""
        away = removal(model, anatomy, own=ADDED)
        edits = (*away, *adding(model, anatomy, self._make, f"sinusoid, amplitude {self.amplitude:g}"))
        if not self.proved:
            blind = removal(model, anatomy)
            check_blind(model, anatomy, blind)
            check_adding(model, anatomy, away, blind, edits)
        sites = anatomy.attending
        notes = (
            *removed(anatomy),
            f"adds {self.amplitude:g} times the sinusoid to the token embeddings, at any length",
        )
        return Proposal(edits, sites, notes, stock=False, claims=("the positions",))

    def _make(self, _: nn.Module) -> nn.Module:
        scale = None if isinstance(self.embedding_scale, str) else float(self.embedding_scale)
        return SinusoidalPositions(float(self.theta), float(self.amplitude), scale)
