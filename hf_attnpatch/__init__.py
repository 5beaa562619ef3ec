"""Swap the attention or the positions of a pretrained transformers model, exactly and reversibly.

Importing this package patches nothing; it only teaches ``AutoConfig`` the model type of its own checkpoints. All else
is imported when it is first asked for: it needs transformers' model classes, which take longer to import than torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import foreign
from .errors import (
    AttnPatchError,
    CalibrationError,
    EvaluationError,
    MissingExtra,
    PatchConflict,
    SelfCheckFailed,
    UnsupportedArchitecture,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy, RotaryModule, Site, describe
    from .api import apply, patched
    from .checkpoint import load
    from .compare import Comparison, compare
    from .diagnose import diagnose
    from .diagnosis import Diagnosis
    from .own_text import OwnText
    from .patch import Patch, from_spec
    from .patches import (
        Alibi,
        AttentionSinks,
        DualChunk,
        Flash,
        GroupedQuery,
        JetLong,
        NoPosition,
        PositionTable,
        ReRope,
        RopeScaling,
        Rotary,
        SegmentRecurrence,
        SelfExtend,
        Sinusoidal,
    )
    from .plan import Plan, plan
    from .publish import Published, push_to_hub
    from .report import Report
    from .request_length import request
    from .rope_search import RopeSearch, search_rope
    from .streams import Stream, stream
    from .strength import set_alibi_strength
    from .verify import Verification, verify

__version__ = "0.1.0.dev0"

foreign.register()


def patch_grouped_query(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`GroupedQuery` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "grouped_query"}))


def patch_rope_scaling(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`RopeScaling` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "rope_scaling"}))


def patch_alibi(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`Alibi` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "alibi"}))


def patch_flash(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`Flash` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "flash"}))


def patch_rotary(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`Rotary` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "rotary"}))


def patch_sinusoidal(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`Sinusoidal` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "sinusoidal"}))


def patch_no_position(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`NoPosition` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "no_position"}))


def patch_position_table(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`PositionTable` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "position_table"}))


def patch_segment_recurrence(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`SegmentRecurrence` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "segment_recurrence"}))


def patch_self_extend(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`SelfExtend` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "self_extend"}))


def patch_dual_chunk(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`DualChunk` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "dual_chunk"}))


def patch_re_rope(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`ReRope` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "re_rope"}))


def patch_jet_long(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`JetLong` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "jet_long"}))


def patch_attention_sinks(model: "PreTrainedModel", **fields: Any) -> "Report":
    """Apply :class:`AttentionSinks` with these fields."""
    from . import apply, from_spec

    return apply(model, from_spec({**fields, "patch": "attention_sinks"}))


__all__ = [
    "Alibi",
    "Anatomy",
    "AttentionSinks",
    "AttnPatchError",
    "CalibrationError",
    "Comparison",
    "Diagnosis",
    "DualChunk",
    "EvaluationError",
    "Flash",
    "GroupedQuery",
    "JetLong",
    "MissingExtra",
    "NoPosition",
    "OwnText",
    "Patch",
    "PatchConflict",
    "Plan",
    "PositionTable",
    "Published",
    "ReRope",
    "Report",
    "RopeScaling",
    "RopeSearch",
    "Rotary",
    "RotaryModule",
    "SegmentRecurrence",
    "SelfCheckFailed",
    "SelfExtend",
    "Sinusoidal",
    "Site",
    "Stream",
    "UnsupportedArchitecture",
    "Verification",
    "apply",
    "compare",
    "describe",
    "diagnose",
    "from_spec",
    "load",
    "patch_alibi",
    "patch_attention_sinks",
    "patch_dual_chunk",
    "patch_flash",
    "patch_grouped_query",
    "patch_jet_long",
    "patch_no_position",
    "patch_position_table",
    "patch_re_rope",
    "patch_rope_scaling",
    "patch_rotary",
    "patch_segment_recurrence",
    "patch_self_extend",
    "patch_sinusoidal",
    "patched",
    "plan",
    "push_to_hub",
    "request",
    "search_rope",
    "set_alibi_strength",
    "stream",
    "verify",
]

# module -> the public names that it defines
_DEFINES = {
    "anatomy": ("Anatomy", "RotaryModule", "Site", "describe"),
    "api": ("apply", "patched"),
    "checkpoint": ("load",),
    "diagnose": ("diagnose",),
    "diagnosis": ("Diagnosis",),
    "compare": ("Comparison", "compare"),
    "own_text": ("OwnText",),
    "patch": ("Patch", "from_spec"),
    "patches": (
        "Alibi",
        "AttentionSinks",
        "DualChunk",
        "Flash",
        "GroupedQuery",
        "JetLong",
        "NoPosition",
        "PositionTable",
        "ReRope",
        "RopeScaling",
        "Rotary",
        "SegmentRecurrence",
        "SelfExtend",
        "Sinusoidal",
    ),
    "plan": ("Plan", "plan"),
    "publish": ("Published", "push_to_hub"),
    "report": ("Report",),
    "request_length": ("request",),
    "rope_search": ("RopeSearch", "search_rope"),
    "streams": ("Stream", "stream"),
    "strength": ("set_alibi_strength",),
    "verify": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _DEFINES.items() for name in names}


if not TYPE_CHECKING:  # to a type checker, it would make every misspelt name a public one

    def __getattr__(name: str) -> Any:
        """Import the module that defines a public name (PEP 562); the name is then an ordinary one."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``plan`` and ``verify`` what they are, functions, when Python binds the modules of these names here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
