"""One patch on one model: apply it, see what it does, decode with a cache, take it back. Numbers are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..api import apply
from ..errors import AttnPatchError, SelfCheckFailed
from ..evaluation.announcing import announced
from ..patch import from_spec
from ..probe import TOLERANCE, largest_difference
from ..rope.request_length import requests_of
from ..stepwise import NoCache
from .decoding import alone, by_hand, generated, texts
from .expected import REFUSES, WORKS, Case
from .text import clean

FAILS = "fails"
NOTHING = "nothing"  # the row of the models as they are
# What a release that does not fit may raise from anywhere: each becomes a row that says so.
CRASHES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
_MOVED = 1e-4  # of the largest logit: less than that is no effect of a patch


@dataclass(frozen=True)
class Trial:
    """What one patch did on one model.

    Attributes:
        patch: as the table of expectations calls it; ``nothing`` for the model as it is.
        model: as the table calls it.
        outcome: ``works``, ``refuses`` or ``fails``.
        expected: ``works`` or ``refuses``.
        difference: of cached decoding to the forward without a cache, relative to the largest logit; the larger of
            ``generate`` and forwards of one's own; None where it did not come to that.
        change: of the logits by the patch, relative to the largest; None where it did not come to that.
        held: most tokens that a layer of the cache held after 26; None where it did not come to that.
        note: why it refuses or fails; empty where it works.
    """

    patch: str
    model: str
    outcome: str
    expected: str
    difference: float | None = None
    change: float | None = None
    held: int | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether this is no fault: it does as expected, or works where a refusal was expected."""
        return self.outcome == WORKS or (self.outcome == REFUSES and self.expected == REFUSES)


class Wrong(AttnPatchError):
    """Something was measured, and it is not what it must be."""


def untouched(name: str, model: PreTrainedModel) -> Trial:
    """Try a model as it is: where transformers itself decodes wrongly, no patch can be blamed."""
    return _tried(NOTHING, name, model, Case({}), None)


def trial(label: str, name: str, model: PreTrainedModel, case: Case) -> Trial:
    """Try a patch on a model and leave it as it was, unless the outcome is ``fails``.

    Args:
        label: of the patch in the table.
        name: of the model in the table.
        model: in eval mode, unpatched.
        case: what the patch is and should do.
    """
    before = _picture(model)
    try:
        report = apply(model, from_spec(case.spec))
    except SelfCheckFailed as error:
        return _fails(label, name, case, error)
    except AttnPatchError as error:
        return _refused(label, name, case, error, _difference_in(before, model))
    except CRASHES as error:
        return _fails(label, name, case, error)
    found = _tried(label, name, model, case, before)
    try:
        report.revert()
        left = _difference_in(before, model)
    except CRASHES as error:
        return found if found.outcome == FAILS else _fails(label, name, case, error)
    return (
        found if left is None or found.outcome == FAILS else _fails(label, name, case, Wrong(f"after revert, {left}"))
    )


def _tried(label: str, name: str, model: PreTrainedModel, case: Case, before: Mapping[str, Any] | None) -> Trial:
    figures: dict[str, Any] = {}
    try:
        _decode(model, figures, TOLERANCE[model.dtype])
        if case.held is not None and figures["held"] > case.held:
            raise Wrong(f"the cache holds {figures['held']} tokens, {case.held} allowed")
        if before is not None:
            figures["change"] = _change(before["answers"], _logits(model))
            _judge_change(figures["change"], name in case.same, TOLERANCE[model.dtype])
    except CRASHES as error:
        return _fails(label, name, case, error, **figures)
    return Trial(label, name, WORKS, _expected(name, case), **figures)


def _decode(model: PreTrainedModel, figures: dict[str, Any], tolerance: float) -> None:
    """Note how far cached decoding is off, by ``generate`` and then by forwards of one's own.

    Raises:
        Wrong: too far.
    """
    prompts = texts(model)
    found = generated(model, prompts)
    figures |= {"difference": found.difference, "held": found.held}
    _judge(found.difference, "generate", tolerance)
    figures["difference"] = max(found.difference, _by_hand(model, prompts[0]))
    _judge(figures["difference"], "forwards of one's own", tolerance)


def _judge(difference: float, way: str, tolerance: float) -> None:
    if not difference <= tolerance:
        raise Wrong(
            f"cached decoding by {way} differs from the forward without a cache by {difference:.2g} of the largest "
            f"logit, {tolerance:.0e} allowed"
        )


def _by_hand(model: PreTrainedModel, text: Tensor) -> float:
    """Decode by forwards of one's own; where angles follow from the request's length, told of it and not told."""
    if requests_of(model) is None:
        return by_hand(model, text)
    with announced(model, len(text)):
        told = by_hand(model, text)
    try:
        return max(told, by_hand(model, text))
    except NoCache:
        raise
    except AttnPatchError:  # it does not guess the length that it was not told: right, too
        return told


def _judge_change(change: float, same: bool, tolerance: float) -> None:
    """Hold the change of the logits to what the table says.

    Raises:
        Wrong: they changed and must not, or the other way round.
    """
    if same and not change <= tolerance:
        raise Wrong(f"the logits changed by {change:.2g} of the largest, and must not")
    if not same and not change > _MOVED:
        raise Wrong(f"the logits changed by {change:.2g} of the largest only: the patch has no effect")


def _logits(model: PreTrainedModel) -> list[Tensor]:
    return [alone(model, text) for text in texts(model)]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    return max(largest_difference(old, new) for old, new in zip(before, after, strict=True))


def _picture(model: PreTrainedModel) -> dict[str, Any]:
    """Note what a model is: its tensors, what its modules are, its config and what it computes."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {path: type(module) for path, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "answers": _logits(model),
    }


def _difference_in(before: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """Say what is no longer, bit by bit, what it was; None where all is."""
    after = _picture(model)
    for what, old in before.items():
        new = after[what]
        if what == "tensors":
            same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        elif what == "answers":
            same = all(map(torch.equal, old, new))
        else:
            same = old == new
        if not same:
            return f"the model's {what} are not what they were"
    return None


def _expected(name: str, case: Case) -> str:
    return WORKS if case.refusal(name) is None else REFUSES


def _refused(label: str, name: str, case: Case, error: AttnPatchError, left: str | None) -> Trial:
    said, known = clean(str(error)), case.refusal(name)
    if left is not None:
        return _fails(label, name, case, Wrong(f"refuses, and {left}: {said}"))
    if known is not None and known not in said:
        return _fails(label, name, case, Wrong(f"refuses, and not because {known!r}: {said}"))
    return Trial(label, name, REFUSES, _expected(name, case), note=said)


def _fails(label: str, name: str, case: Case, error: Exception, **figures: Any) -> Trial:
    said = clean(str(error))
    kind = "" if isinstance(error, (Wrong, NoCache)) else f"{type(error).__name__}: "
    return Trial(label, name, FAILS, _expected(name, case), **figures, note=f"{kind}{said}")
