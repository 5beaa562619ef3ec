"""No positions: a model that looks back only still knows that it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..patch import Patch, Proposal, changed
from ..positions.removal import check_blind, none_there, removal, removed


@dataclass(frozen=True, kw_only=True)
class NoPosition(Patch):
    """No position encoding (NoPE, 2305.19466; DroPE, 2512.12167): whatever told positions is taken out.

    Rotary modules are asked for position 0 only, position tables are taken out, biases by distance left out, and what
    another patch of this package added goes, too. DroPE does so late in training and recalibrates at the old length.
    Stock transformers cannot express the result, so its checkpoints are of this package's model type. An encoder
    without positions reads a bag of words; the report says so.

    Raises:
        UnsupportedArchitecture: something tells positions that was not recognised or cannot be taken out.
    """

    name: ClassVar[str] = "no_position"
    changes_positions: ClassVar[bool] = True

    # a checkpoint's own structure, which is not tried again while it is being loaded
    proved: bool = field(default=False, init=False, repr=False)

    def structure(self) -> Patch:
        """Return the patch without a probe: a model that is being loaded cannot run yet."""
        return changed(self, proved=True)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say what would be taken out; see :meth:`Patch.propose`."""
        edits = removal(model, anatomy)
        why = "" if self.proved else check_blind(model, anatomy, edits)
        if not edits:
            return Proposal((), (), (none_there(why),), preserves=True)
        both = any(site.causal is False and not site.cross and not site.tower for site in anatomy.sites)
        bag = ("attention looks both ways: without positions it sees a bag of tokens",) if both else ()
        sites = anatomy.attending
        return Proposal(edits, sites, (*removed(anatomy), *bag), stock=False, claims=("the positions",))
