"""A temperature of the attention scores that grows with position."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..homes.checks import named, rotary_alone
from ..homes.fitting import check_read, current, find
from ..layers import STEP, Temperature
from ..patch import Patch, Proposal, changed
from ..rope.fields import check_number


@dataclass(frozen=True, kw_only=True)
class ScoreTemperature(Patch):
    """Position-dependent temperature: queries at t are multiplied by 1 + slope * log(1 + floor(t / step)).

    Attention over more tokens than a model was trained on spreads out; larger scores concentrate it again (SWAN-GPT,
    2504.08719; Llama 4). Queries before ``step`` are unchanged, bit for bit. A Llama-like model becomes a stock type
    that computes this (``ministral3``), if that type holds the model bit for bit, alone or on top of YaRN.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        slope: beta of the paper, at least 0; 0.1 in Llama 4. 0 changes nothing.
        step: in tokens; None takes the context that the model was trained on.
        home: stock model type for the result; ``auto`` takes the first that fits.

    Raises:
        UnsupportedArchitecture: no stock type can express this for the model.
        AttnPatchError: an argument out of range.
    """

    name: ClassVar[str] = "score_temperature"
    experimental: ClassVar[bool] = True

    slope: float
    step: int | None = None
    home: str = "auto"

    def __post_init__(self) -> None:
        if self.slope != 0:
            check_number("slope", self.slope)
        if self.step is not None:
            if not isinstance(self.step, int) or isinstance(self.step, bool) or self.step < 1:
                raise AttnPatchError(f"step is {self.step!r}; it must be a number of tokens, at least 1, or None.")
        if self.home is None:
            raise AttnPatchError("home is None; a temperature needs a stock type that computes it: choose auto.")
        named(self.home)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edit that changes the model's type; see :meth:`Patch.propose`."""
        rotary_alone(anatomy)
        now = current(model)
        rope = model.config.rope_parameters
        step = self.step or rope.get(STEP) or anatomy.max_positions
        if not isinstance(step, int):
            raise UnsupportedArchitecture(f"{anatomy.architecture}: declares no context; give step.")
        wanted = dataclasses.replace(now, temperature=Temperature(float(self.slope), step))
        if wanted == now:
            check_read(model, now)
            return Proposal((), (), ("the model has this temperature already",), preserves=True)
        found = find(model, wanted, self.home)
        said = f"queries from position {step} on are multiplied by 1 + {self.slope:g} log(1 + floor(t / {step}))"
        chosen = changed(self, step=step, home=found.home.model_type)
        return Proposal(
            (found.edit,), anatomy.attending, (said, *found.notes), claims=("the score temperature",), patch=chosen
        )
