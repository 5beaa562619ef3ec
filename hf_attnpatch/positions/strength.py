"""How strong a model's ALiBi is, for a recipe that warms it up."""

from __future__ import annotations

from transformers import PreTrainedModel

from .. import record
from ..anatomy import describe
from ..attention.alibi import alibi_of
from ..errors import AttnPatchError


def set_alibi_strength(model: PreTrainedModel, strength: float) -> None:
    """Scale the slopes of a model that :class:`Alibi` gave them, in place, from the next forward on.

    Experimental: its arguments may get other names or defaults between minor versions.

    A model that learned without distances meets full slopes as a shock; published practice has no answer to it. Start
    at 0, or little, and raise: ``set_alibi_strength(model, min(1.0, step / warmup_steps))`` before each step. The
    strength goes into the config, so that a checkpoint saved on the way computes what it was saved with.

    Args:
        model: patched by ``patch_alibi``.
        strength: factor on the slopes, 0 or more; 1 is what was asked for.

    Raises:
        AttnPatchError: there is no such model, or the strength is below 0.
    """
    if not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise AttnPatchError(f"strength is {strength!r}; it must be a number, 0 or more.")
    paths = describe(model).biased
    if not paths:
        raise AttnPatchError(f"{type(model).__name__} has no ALiBi of this package; apply patch_alibi first.")
    for path in paths:
        bias = alibi_of(model.get_submodule(path))
        assert bias is not None
        bias.strength = float(strength)
    for spec in getattr(model.config, record.FIELD)["patches"]:
        if spec["patch"] == "alibi":
            spec["strength"] = float(strength)
