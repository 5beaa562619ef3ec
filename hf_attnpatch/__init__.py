"""Swap the attention or the positions of a pretrained transformers model, exactly and reversibly.

Importing this package patches nothing; it only teaches ``AutoConfig`` the model type of its own checkpoints. All else
is imported when it is first asked for: it needs transformers' model classes, which take longer to import than torch.
"""

import importlib
import sys
from collections.abc import Callable
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
    UpstreamChanged,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy, RotaryModule, Site, describe
    from .api import apply, patched
    from .checkpoint import load
    from .compare import Comparison, compare
    from .diagnose import diagnose
    from .diagnosing.diagnosis import Diagnosis
    from .doctor import doctor, doctor_checkpoint, write_legacy_keys
    from .doctoring.legacy import LegacyKeys
    from .doctoring.reading import CheckpointReport
    from .doctoring.result import DoctorReport
    from .heads.own_text import OwnText
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
        RelativeXl,
        ReRope,
        RopeScaling,
        Rotary,
        SegmentRecurrence,
        SelfExtend,
        Sinusoidal,
    )
    from .plan import Plan, plan
    from .positions.strength import set_alibi_strength
    from .publish import Published, push_to_hub
    from .recurrence.streams import Stream, stream
    from .report import Report
    from .rope.request_length import request
    from .rope.search import RopeSearch, search_rope
    from .verify import Verification, verify

__version__ = "0.1.0.dev0"

foreign.register()


def _one_line(name: str, patch: str) -> Callable[..., "Report"]:
    def function(model: "PreTrainedModel", **fields: Any) -> "Report":
        from . import apply, from_spec

        return apply(model, from_spec({**fields, "patch": name}, trust_remote_code=True))  # the caller's own words

    function.__name__ = function.__qualname__ = f"patch_{name}"
    function.__doc__ = f"Apply :class:`{patch}` with these fields."
    return function


patch_alibi = _one_line("alibi", "Alibi")
patch_attention_sinks = _one_line("attention_sinks", "AttentionSinks")
patch_dual_chunk = _one_line("dual_chunk", "DualChunk")
patch_flash = _one_line("flash", "Flash")
patch_grouped_query = _one_line("grouped_query", "GroupedQuery")
patch_jet_long = _one_line("jet_long", "JetLong")
patch_no_position = _one_line("no_position", "NoPosition")
patch_position_table = _one_line("position_table", "PositionTable")
patch_re_rope = _one_line("re_rope", "ReRope")
patch_relative_xl = _one_line("relative_xl", "RelativeXl")
patch_rope_scaling = _one_line("rope_scaling", "RopeScaling")
patch_rotary = _one_line("rotary", "Rotary")
patch_segment_recurrence = _one_line("segment_recurrence", "SegmentRecurrence")
patch_self_extend = _one_line("self_extend", "SelfExtend")
patch_sinusoidal = _one_line("sinusoidal", "Sinusoidal")

__all__ = [
    "Alibi",
    "Anatomy",
    "AttentionSinks",
    "AttnPatchError",
    "CalibrationError",
    "CheckpointReport",
    "Comparison",
    "Diagnosis",
    "DoctorReport",
    "DualChunk",
    "EvaluationError",
    "Flash",
    "GroupedQuery",
    "JetLong",
    "LegacyKeys",
    "MissingExtra",
    "NoPosition",
    "OwnText",
    "Patch",
    "PatchConflict",
    "Plan",
    "PositionTable",
    "Published",
    "ReRope",
    "RelativeXl",
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
    "UpstreamChanged",
    "Verification",
    "apply",
    "compare",
    "describe",
    "diagnose",
    "doctor",
    "doctor_checkpoint",
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
    "patch_relative_xl",
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
    "write_legacy_keys",
]

# module -> the public names that it defines
_DEFINES = {
    "anatomy": ("Anatomy", "RotaryModule", "Site", "describe"),
    "api": ("apply", "patched"),
    "checkpoint": ("load",),
    "diagnose": ("diagnose",),
    "diagnosing.diagnosis": ("Diagnosis",),
    "doctor": ("doctor", "doctor_checkpoint", "write_legacy_keys"),
    "doctoring.legacy": ("LegacyKeys",),
    "doctoring.reading": ("CheckpointReport",),
    "doctoring.result": ("DoctorReport",),
    "compare": ("Comparison", "compare"),
    "heads.own_text": ("OwnText",),
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
        "RelativeXl",
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
    "rope.request_length": ("request",),
    "rope.search": ("RopeSearch", "search_rope"),
    "recurrence.streams": ("Stream", "stream"),
    "positions.strength": ("set_alibi_strength",),
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
