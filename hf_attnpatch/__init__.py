"""Swap the attention or the positions of a pretrained transformers model, exactly and reversibly.

Importing this package patches nothing; it only teaches ``AutoConfig`` the model type of its own checkpoints.
"""

from typing import Any

from transformers import PreTrainedModel

from . import foreign
from .anatomy import Anatomy, Rotary, Site, describe
from .api import apply, patched
from .checkpoint import load
from .errors import AttnPatchError, MissingExtra, PatchConflict, SelfCheckFailed, UnsupportedArchitecture
from .patch import Patch, from_spec
from .patches import Flash, GroupedQuery, RopeScaling
from .plan import Plan, plan
from .report import Report
from .verify import Verification, verify

__version__ = "0.1.0.dev0"

foreign.register()


def patch_grouped_query(model: PreTrainedModel, **fields: Any) -> Report:
    """Apply :class:`GroupedQuery` with these fields."""
    return apply(model, GroupedQuery(**fields))


def patch_rope_scaling(model: PreTrainedModel, **fields: Any) -> Report:
    """Apply :class:`RopeScaling` with these fields."""
    return apply(model, RopeScaling(**fields))


def patch_flash(model: PreTrainedModel, **fields: Any) -> Report:
    """Apply :class:`Flash` with these fields."""
    return apply(model, Flash(**fields))


__all__ = [
    "Anatomy",
    "AttnPatchError",
    "Flash",
    "GroupedQuery",
    "MissingExtra",
    "Patch",
    "PatchConflict",
    "Plan",
    "Report",
    "RopeScaling",
    "Rotary",
    "SelfCheckFailed",
    "Site",
    "UnsupportedArchitecture",
    "Verification",
    "apply",
    "describe",
    "from_spec",
    "load",
    "patch_flash",
    "patch_grouped_query",
    "patch_rope_scaling",
    "patched",
    "plan",
    "verify",
]
