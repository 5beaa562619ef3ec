"""No positions: a model that looks back only still knows that it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import UnsupportedArchitecture
from ..homes.checks import checked_layers, named, rotary_alone
from ..homes.fitting import check_read, current, find
from ..patch import Patch, Proposal, changed
from ..positions.removal import check_blind, none_there, removal, removed


@dataclass(frozen=True, kw_only=True)
class NoPosition(Patch):
    """No position encoding (NoPE, 2305.19466; DroPE, 2512.12167): whatever told positions is taken out.

    A Llama-like model becomes a stock type whose layers may go without rotation (``smollm3``, ``granite_swa``), if one
    holds it bit for bit: its checkpoints load without this package. Elsewhere rotary modules are asked for position 0
    only, position tables are taken out, biases by distance left out, and what another patch of this package added goes,
    too; such checkpoints are of this package's model type. DroPE does so late in training and recalibrates at the old
    length. An encoder without positions reads a bag of words; the report says so.

    Args:
        layers: numbers of the layers that lose their positions, from 0 (RNoPE, SWAN); None takes all. Needs a home.
        home: stock model type that is to hold the model: ``auto`` takes the first that fits, a name that one; None
            leaves the model's type alone.

    Raises:
        UnsupportedArchitecture: something tells positions that was not recognised or cannot be taken out, or no home
            can say which layers.
        AttnPatchError: there is no such layer or home.
    """

    name: ClassVar[str] = "no_position"
    changes_positions: ClassVar[bool] = True

    layers: Sequence[int] | None = None
    home: str | None = "auto"
    # a checkpoint's own structure, which is not tried again while it is being loaded
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._normalise("layers", checked_layers(self.layers))
        named(self.home)

    def structure(self) -> Patch:
        """Return the patch without a probe: a model that is being loaded cannot run yet."""
        return changed(self, proved=True)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say what would be taken out; see :meth:`Patch.propose`."""
        notes: tuple[str, ...] = ()
        if self.home is not None and not self.proved and anatomy.rotary:
            try:
                return self._moved(model, anatomy, self.home)
            except UnsupportedArchitecture as error:
                if self.layers is not None or self.home != "auto":
                    raise
                notes = (f"no stock type holds the result: {error}",)
        if self.layers is not None:
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: layers are told apart by a stock type that can say so (home='auto')."
            )
        return self._taken_out(model, anatomy, notes)

    def _moved(self, model: PreTrainedModel, anatomy: Anatomy, home: str) -> Proposal:
        """The model becomes one of a type whose layers may go without rotation."""
        rotary_alone(anatomy)
        now = current(model)
        wanted = now.rotated(None, self.layers)
        if wanted == now:
            check_read(model, now)
            return Proposal((), (), ("these layers rotate nothing already",), preserves=True)
        found = find(model, wanted, home)
        which = [n for n, (a, b) in enumerate(zip(now.bases, wanted.bases, strict=True)) if a != b]
        said = f"rotation taken out of {len(which)} of {len(now.bases)} layers"
        scale = {float(getattr(model.get_submodule(r.path), "attention_scaling", 1.0)) for r in anatomy.rotary} - {1.0}
        gone = tuple(f"the factor {each:.4g} on cos and sin goes with them" for each in scale)
        chosen = changed(self, home=found.home.model_type)
        notes = (said, *gone, *found.notes)
        return Proposal((found.edit,), anatomy.attending, notes, claims=("the positions",), patch=chosen)

    def _taken_out(self, model: PreTrainedModel, anatomy: Anatomy, notes: tuple[str, ...]) -> Proposal:
        """Modules of this package stand where positions were told."""
        edits = removal(model, anatomy)
        why = "" if self.proved else check_blind(model, anatomy, edits)
        if not edits:
            return Proposal((), (), (none_there(why),), preserves=True)
        both = any(site.causal is False and not site.cross and not site.tower for site in anatomy.sites)
        bag = ("attention looks both ways: without positions it sees a bag of tokens",) if both else ()
        said = (*removed(anatomy), *bag, *notes)
        chosen = changed(self, home=None)
        return Proposal(edits, anatomy.attending, said, stock=False, claims=("the positions",), patch=chosen)
