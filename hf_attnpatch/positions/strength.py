"""Sets the strength of a model's ALiBi bias, for recipes that warm it up."""

from __future__ import annotations

from transformers import PreTrainedModel

from .. import record
from ..anatomy import describe
from ..attention.alibi import alibi_of
from ..errors import AttnPatchError


def set_alibi_strength(model: PreTrainedModel, strength: float) -> None:
    """Scale the ALiBi slopes of a patched model in place, from the next forward on.

    Experimental: its arguments may get other names or defaults between minor versions.

    Full slopes are a shock to a model that learned without distances, and published practice has no remedy. Start at 0,
    or at little, and raise it: ``set_alibi_strength(model, min(1.0, step / warmup_steps))`` before each step. The
    strength is stored in the config, so that a checkpoint computes what it was saved with.

    Args:
        model: a model patched by ``patch_alibi``.
        strength: factor on the slopes, 0 or more; 1 is the patch's own value.

    Raises:
        AttnPatchError: the model has no ALiBi of this package, or the strength is negative.
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
