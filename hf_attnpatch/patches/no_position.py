"""Removes the positions of a model; a causal mask still tells it the order of tokens."""

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
    """No position encoding (NoPE, 2305.19466; DroPE, 2512.12167): removes whatever the model knows positions by.

    A Llama-like model becomes a stock type whose layers may go without rotation (``smollm3``, ``granite_swa``), if one
    holds it bit for bit: its checkpoints load without this package. Otherwise rotary modules are fixed at position 0,
    position tables are removed, ALiBi biases are left out, and positions added by another patch of this package are
    removed, too; such checkpoints have this package's model type. DroPE does this late in training and recalibrates at
    the old length. An encoder without positions reads a bag of words; the report says so.

    Args:
        layers: indices of the layers that lose their positions (RNoPE, SWAN); None takes all. Needs a home.
        home: stock model type for the result: ``auto`` takes the first that fits, a name takes that type, None keeps
            the
            model's own type.

    Raises:
        UnsupportedArchitecture: the model has positions that are not recognised or cannot be removed, or no home can
            express the layers.
        AttnPatchError: no such layer or home.
    """

    name: ClassVar[str] = "no_position"
    changes_positions: ClassVar[bool] = True

    layers: Sequence[int] | None = None
    home: str | None = "auto"
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._normalise("layers", checked_layers(self.layers))
        named(self.home)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that remove the positions; see :meth:`Patch.propose`."""
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
                f"{anatomy.architecture}: only a stock type can leave single layers without positions; pass "
                f"home='auto'."
            )
        return self._taken_out(model, anatomy, notes)

    def _moved(self, model: PreTrainedModel, anatomy: Anatomy, home: str) -> Proposal:
        """Move the model to a type whose layers may go without rotation."""
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
        """Replace the modules that encode positions by modules of this package."""
        edits = removal(model, anatomy)
        why = "" if self.proved else check_blind(model, anatomy, edits)
        if not edits:
            return Proposal((), (), (none_there(why),), preserves=True)
        both = any(site.causal is False and not site.cross and not site.tower for site in anatomy.sites)
        bag = ("attention is bidirectional: without positions it sees a bag of tokens",) if both else ()
        said = (*removed(anatomy), *bag, *notes)
        chosen = changed(self, home=None)
        return Proposal(edits, anatomy.attending, said, stock=False, claims=("the positions",), patch=chosen)
