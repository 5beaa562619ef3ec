"""The model under test, its inputs, and their padding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..probe import codebooks, largest_difference
from ..upstream import words
from ..upstream.roles import Roles, predicted, roles_of
from .noise import rounding


@dataclass(frozen=True)
class Measured:
    """A measurement and its largest allowed value; ``what`` describes it."""

    figure: float
    tolerance: float
    what: str = "relative to the largest logit"


Answer = Measured | str  # a measurement, or why the invariant does not apply


@dataclass(frozen=True)
class Subject:
    """A model and the tokens on which it is tested.

    Attributes:
        model: in eval mode.
        anatomy: of the model.
        inputs: of its forward, without padding and without a mask.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    inputs: Mapping[str, Tensor]

    @functools.cached_property
    def roles(self) -> Roles:
        """The argument roles of the model's forward."""
        return roles_of(self.model)

    @property
    def stream(self) -> str:
        """The input that grows while decoding."""
        second = self.roles.names.get(words.DECODER_TOKENS, "")
        return second if second in self.inputs else self.roles.name(words.TOKENS)

    @property
    def tokens(self) -> Tensor:
        """The ids that grow while decoding, (rows, length)."""
        return self.inputs[self.stream]

    @property
    def item(self) -> int:
        """Rows that form one sequence: one, or one for each codebook."""
        return codebooks(self.model)

    @property
    def generates(self) -> bool:
        """Whether it generates from left to right."""
        return bool(self.model.can_generate())

    @functools.cached_property
    def rounding(self) -> float:
        """The difference that rounding alone explains, in this dtype and model."""
        return rounding(self.model, self.logits)

    def takes(self, role: str) -> bool:
        """Whether the forward has an argument of this role."""
        return self.roles.takes(role)

    def run(self, inputs: Mapping[str, Tensor] | None = None, **extra: Any) -> Any:
        """Run a forward; by default on all inputs and without a cache."""
        if self.takes(words.USE_CACHE):
            extra.setdefault(self.roles.name(words.USE_CACHE), False)
        return self.model(**{**(self.inputs if inputs is None else inputs), **extra})

    def logits(self, inputs: Mapping[str, Tensor] | None = None, **extra: Any) -> Tensor:
        """Return the logits of a forward, or its hidden states if it has none."""
        return predicted(self.run(inputs, **extra))

    def with_tokens(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the inputs with other tokens."""
        return {**self.inputs, self.stream: tokens}


def compare(subject: Subject, wanted: Tensor, found: Tensor, tolerance: float | None = None) -> Measured:
    """Measure the difference of logits; the default tolerance is rounding."""
    return Measured(largest_difference(wanted, found), subject.rounding if tolerance is None else tolerance)


def left(subject: Subject) -> bool:
    """Return whether padding goes on the left: for models that continue one sequence."""
    return subject.generates and not subject.model.config.is_encoder_decoder


def pad(subject: Subject, inputs: Mapping[str, Tensor], by: int) -> dict[str, Tensor]:
    """Return inputs padded by ``by`` arbitrary tokens, with their mask and positions."""
    tokens = subject.roles.name(words.TOKENS)
    ids = inputs[tokens]
    fill = ids[:, :1].expand(-1, by)
    mask = torch.ones(ids.shape[0] // subject.item, ids.shape[1], dtype=torch.long, device=ids.device)
    none = mask.new_zeros(mask.shape[0], by)
    mask = torch.cat([none, mask] if left(subject) else [mask, none], 1)
    wide = torch.cat([fill, ids] if left(subject) else [ids, fill], 1)
    return {**inputs, tokens: wide, subject.roles.name(words.MASK): mask, **positions(subject, mask)}


def positions(subject: Subject, mask: Tensor) -> dict[str, Tensor]:
    """Return positions as ``generate`` passes them, for families that take them."""
    if not subject.takes(words.POSITIONS) or not left(subject):
        return {}
    return {subject.roles.name(words.POSITIONS): (mask.cumsum(1) - 1).clamp_min(0)}


def unpadded(subject: Subject, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits to compare padded ones with: same positions, no padding, no mask."""
    plain = {k: v for k, v in pad(subject, inputs, 0).items() if k != subject.roles.name(words.MASK)}
    return subject.logits(plain)


def cut(subject: Subject, logits: Tensor, by: int) -> Tensor:
    """Return the logits at tokens that are not padding."""
    if subject.stream != subject.roles.name(words.TOKENS):
        return logits
    return logits[:, by:] if left(subject) else logits[:, : logits.shape[1] - by]
