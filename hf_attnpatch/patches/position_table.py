"""Learned position tables: lengthens existing ones, adds new ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..edits import ReplaceModule
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.tables import METHODS, lengthened
from ..functional.turning import sinusoid
from ..modules.added import CHILD, LearnedPositions
from ..patch import Patch, Proposal, changed, decided
from ..positions.adding import adding, check_adding
from ..positions.lengthening import learned, longer, positions
from ..positions.removal import ADDED, check_blind, removal, removed
from ..probe import check_loaded
from ..rope.fields import check_reach

INITS = ("zeros", "sinusoidal")


@dataclass(frozen=True, kw_only=True)
class PositionTable(Patch):
    """Learned absolute position embeddings for ``target_length`` tokens: a longer table, or a new one.

    An existing table keeps its rows and more are made from them. The config's maximum and the buffers of that length
    (BERT's position and segment ids, GPT-Neo's masks) grow with it, rows before position 0 (OPT, RoBERTa) stay, and
    stock transformers loads the result. A model without a table (rotary, ALiBi, fixed sinusoid, none) loses its
    positions, and a new trainable table is added to the token embeddings; positions are ``position_ids`` if passed,
    otherwise counted from the attention mask. Such checkpoints hold the table and have this package's model type.

    Args:
        target_length: number of positions, in tokens; at least those of the present table.
        factor: the same as a multiple of the positions that the model has; give one of the two.
        method: for an existing table: ``tile`` (Longformer, 2004.05150), ``interpolate`` (trained positions spaced
            evenly
            from end to end: every row changes) or ``hierarchical`` (Su, 2020, alpha 0.4: up to the square of the old
            length). None takes ``hierarchical``; it and ``tile`` change nothing within the old length.
        init: for a new table: ``zeros``, which starts as a model without positions, or ``sinusoidal``, the rows of
            ``patch_sinusoidal``. None takes ``zeros``.

    Raises:
        AttnPatchError: a length below the trained one or above its square, or an option for the other case.
        UnsupportedArchitecture: another tensor has the table's length, or the old positions cannot be removed.
    """

    name: ClassVar[str] = "position_table"
    changes_positions: ClassVar[bool] = True

    target_length: int | None = None
    factor: float | None = None
    method: Literal["tile", "interpolate", "hierarchical"] | None = None
    init: Literal["zeros", "sinusoidal"] | None = None
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_reach(self.factor, self.target_length)
        if self.factor is None and self.target_length is None:
            raise AttnPatchError(
                "position_table: target_length is missing; give it, in tokens, or factor, new context over old."
            )
        if self.method not in (None, *METHODS):
            raise AttnPatchError(f"method {self.method!r} does not exist; choose from: {', '.join(METHODS)}.")
        if self.init not in (None, *INITS):
            raise AttnPatchError(f"init {self.init!r} does not exist; choose from: {', '.join(INITS)}.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that make the table; see :meth:`Patch.propose`."""
        if self.factor is not None:
            length = round(self.factor * _declared(anatomy))
            return decided(changed(self, target_length=length, factor=None), model, anatomy)
        tables = learned(model, anatomy)
        own = [f"{anatomy.base}.{CHILD}".lstrip(".")] if anatomy.added == "table" else []
        for path in tables or own or [_embedding(model, anatomy.base)]:
            check_loaded(model, path)
        if tables or anatomy.added == "table":
            return self._longer(model, anatomy, tables)
        if self.method is not None:
            raise AttnPatchError(
                f"{anatomy.architecture}: has no learned position table to {self.method} (positions here are: "
                f"{anatomy.positions}); leave method out for a new one."
            )
        away = removal(model, anatomy, own=ADDED)
        edits = (*away, *adding(model, anatomy, self._make, f"a table of {self._length} positions, {self._init}"))
        if not self.proved:
            blind = removal(model, anatomy)
            check_blind(model, anatomy, blind)
            check_adding(model, anatomy, away, blind, edits)
        sites = anatomy.attending
        notes = (*removed(anatomy), f"a new trainable table of {self._length} positions, {self._init}")
        return Proposal(edits, sites, notes, stock=False, claims=("the positions",))

    def _longer(self, model: PreTrainedModel, anatomy: Anatomy, tables: list[str]) -> Proposal:
        own = f"{anatomy.base}.{CHILD}".lstrip(".")
        trained = positions(model, anatomy, tables) if tables else len(model.get_submodule(own).get_parameter("weight"))
        method = self.method or "hierarchical"
        if self.init is not None:
            raise AttnPatchError(f"{anatomy.architecture}: init is for a new table, and it has one; choose a method.")
        if self._length < trained:
            raise AttnPatchError(
                f"target_length {self._length} is below the {trained} positions that {(tables or [own])[0]} has."
            )
        if self._length == trained:
            return Proposal((), (), (f"the table has {trained} positions already",), preserves=True)
        if method == "hierarchical" and self._length > trained**2:
            raise AttnPatchError(
                f"target_length {self._length} is beyond {trained**2}, the square of {trained}; tile the table."
            )
        new = ReplaceModule(
            own, lambda old: _lengthened(old, self._length, method), f"{self._length} positions, {method}"
        )
        edits = longer(model, anatomy, tables, self._length, method) if tables else (new,)
        sites = tuple(tables) or anatomy.attending  # FNet has no attention, and BigBird replaces its own as it runs
        note = f"{trained} positions become {self._length}, {method}"
        kept, claims = method != "interpolate", ("the positions",)
        return Proposal(edits, sites, (note,), stock=bool(tables), preserves=kept, claims=claims)

    @property
    def _length(self) -> int:
        assert self.target_length is not None
        return self.target_length

    @property
    def _init(self) -> str:
        return self.init or "zeros"

    def _make(self, base: nn.Module) -> nn.Module:
        embeddings = base.get_input_embeddings().weight  # type: ignore[operator]  # a model of transformers
        rows = embeddings.new_zeros(self._length, embeddings.shape[1])
        if self._init == "sinusoidal":
            places = torch.arange(self._length, device=embeddings.device)
            rows = sinusoid(places, embeddings.shape[1]).to(embeddings.dtype)
        return LearnedPositions(rows)


def _declared(anatomy: Anatomy) -> int:
    if anatomy.max_positions is None:
        raise UnsupportedArchitecture(f"{anatomy.architecture}: declares no context to multiply; give target_length.")
    return anatomy.max_positions


def _embedding(model: PreTrainedModel, base: str | None) -> str:
    """Return the path of the token embedding, next to which a new table is created; empty if there is none."""
    found = model.get_submodule(base or "").get_input_embeddings()
    return next((path for path, module in model.named_modules() if module is found), "")


def _lengthened(old: nn.Module, length: int, method: str) -> nn.Module:
    return LearnedPositions(lengthened(old.get_parameter("weight").detach(), length, method))
