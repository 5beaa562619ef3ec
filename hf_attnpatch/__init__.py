"""Swap the attention or the positions of a pretrained transformers model, exactly and reversibly.

``from hf_attnpatch import *`` imports the verbs and the most used patches. Every other public name is an attribute of
the package, too (``hf_attnpatch.patch_re_rope``): result types, errors, and experimental functions, whose arguments may
still change names or defaults between minor versions.

Importing this package patches nothing; it only registers the model type of its own checkpoints with ``AutoConfig``.
Everything else is imported on first use, because transformers' model classes take longer to import than torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .arrival import register_on_arrival
from .errors import AttnPatchError
from .errors import CalibrationError as CalibrationError
from .errors import EvaluationError as EvaluationError
from .errors import MissingExtra as MissingExtra
from .errors import PatchConflict as PatchConflict
from .errors import SelfCheckFailed as SelfCheckFailed
from .errors import UnsupportedArchitecture as UnsupportedArchitecture
from .errors import UpstreamChanged as UpstreamChanged

if TYPE_CHECKING:
    from .anatomy import Anatomy as Anatomy
    from .anatomy import RotaryModule as RotaryModule
    from .anatomy import Site as Site
    from .anatomy import describe
    from .api import apply, patched
    from .checkpoint import load
    from .compare import Comparison as Comparison
    from .compare import compare
    from .convert import Converted as Converted
    from .convert import convert as convert
    from .diagnose import diagnose
    from .diagnosing.diagnosis import Diagnosis as Diagnosis
    from .doctor import doctor
    from .doctor import doctor_checkpoint as doctor_checkpoint
    from .doctor import write_legacy_keys as write_legacy_keys
    from .doctoring.legacy import LegacyKeys as LegacyKeys
    from .doctoring.reading import CheckpointReport as CheckpointReport
    from .doctoring.result import DoctorReport as DoctorReport
    from .heads.own_text import OwnText as OwnText
    from .one_liners import (
        patch_alibi,
        patch_flash,
        patch_grouped_query,
        patch_no_position,
        patch_position_table,
        patch_rope_scaling,
        patch_rotary,
        patch_segment_recurrence,
        patch_self_extend,
    )
    from .one_liners import patch_attention_sinks as patch_attention_sinks
    from .one_liners import patch_dual_chunk as patch_dual_chunk
    from .one_liners import patch_jet_long as patch_jet_long
    from .one_liners import patch_latent as patch_latent
    from .one_liners import patch_re_rope as patch_re_rope
    from .one_liners import patch_relative_xl as patch_relative_xl
    from .one_liners import patch_score_temperature as patch_score_temperature
    from .one_liners import patch_sinusoidal as patch_sinusoidal
    from .one_liners import patch_windowed as patch_windowed
    from .patch import Patch as Patch
    from .patch import from_spec
    from .patches import (
        Alibi,
        Flash,
        GroupedQuery,
        NoPosition,
        PositionTable,
        RopeScaling,
        Rotary,
        SegmentRecurrence,
        SelfExtend,
    )
    from .patches import AttentionSinks as AttentionSinks
    from .patches import DualChunk as DualChunk
    from .patches import JetLong as JetLong
    from .patches import Latent as Latent
    from .patches import RelativeXl as RelativeXl
    from .patches import ReRope as ReRope
    from .patches import ScoreTemperature as ScoreTemperature
    from .patches import Sinusoidal as Sinusoidal
    from .patches import Windowed as Windowed
    from .plan import Plan as Plan
    from .plan import plan
    from .positions.strength import set_alibi_strength as set_alibi_strength
    from .publish import Published as Published
    from .publish import push_to_hub
    from .recurrence.streams import Stream as Stream
    from .recurrence.streams import stream as stream
    from .report import Report as Report
    from .rope.request_length import request as request
    from .rope_search.search import RopeSearch as RopeSearch
    from .rope_search.search import search_rope as search_rope
    from .verify import Verification as Verification
    from .verify import verify

__version__ = "0.2.0"

register_on_arrival()

__all__ = [
    "Alibi",
    "AttnPatchError",
    "Flash",
    "GroupedQuery",
    "NoPosition",
    "PositionTable",
    "RopeScaling",
    "Rotary",
    "SegmentRecurrence",
    "SelfExtend",
    "apply",
    "compare",
    "describe",
    "diagnose",
    "doctor",
    "from_spec",
    "load",
    "patch_alibi",
    "patch_flash",
    "patch_grouped_query",
    "patch_no_position",
    "patch_position_table",
    "patch_rope_scaling",
    "patch_rotary",
    "patch_segment_recurrence",
    "patch_self_extend",
    "patched",
    "plan",
    "push_to_hub",
    "verify",
]

# module -> the public names that it defines
_DEFINES = {
    "anatomy": (
        "Anatomy",
        "RotaryModule",
        "Site",
        "describe",
    ),
    "api": (
        "apply",
        "patched",
    ),
    "checkpoint": ("load",),
    "compare": (
        "Comparison",
        "compare",
    ),
    "convert": (
        "Converted",
        "convert",
    ),
    "diagnose": ("diagnose",),
    "diagnosing.diagnosis": ("Diagnosis",),
    "doctor": (
        "doctor",
        "doctor_checkpoint",
        "write_legacy_keys",
    ),
    "doctoring.legacy": ("LegacyKeys",),
    "doctoring.reading": ("CheckpointReport",),
    "doctoring.result": ("DoctorReport",),
    "heads.own_text": ("OwnText",),
    "one_liners": (
        "patch_alibi",
        "patch_attention_sinks",
        "patch_dual_chunk",
        "patch_flash",
        "patch_grouped_query",
        "patch_jet_long",
        "patch_latent",
        "patch_no_position",
        "patch_position_table",
        "patch_re_rope",
        "patch_relative_xl",
        "patch_rope_scaling",
        "patch_rotary",
        "patch_score_temperature",
        "patch_segment_recurrence",
        "patch_self_extend",
        "patch_sinusoidal",
        "patch_windowed",
    ),
    "patch": (
        "Patch",
        "from_spec",
    ),
    "patches": (
        "Alibi",
        "AttentionSinks",
        "DualChunk",
        "Flash",
        "GroupedQuery",
        "JetLong",
        "Latent",
        "NoPosition",
        "PositionTable",
        "ReRope",
        "RelativeXl",
        "RopeScaling",
        "Rotary",
        "ScoreTemperature",
        "SegmentRecurrence",
        "SelfExtend",
        "Sinusoidal",
        "Windowed",
    ),
    "plan": (
        "Plan",
        "plan",
    ),
    "positions.strength": ("set_alibi_strength",),
    "publish": (
        "Published",
        "push_to_hub",
    ),
    "recurrence.streams": (
        "Stream",
        "stream",
    ),
    "report": ("Report",),
    "rope.request_length": ("request",),
    "rope_search.search": (
        "RopeSearch",
        "search_rope",
    ),
    "verify": (
        "Verification",
        "verify",
    ),
}
_MODULE_OF = {name: module for module, names in _DEFINES.items() for name in names}


if not TYPE_CHECKING:  # hidden from type checkers, to which any misspelt name would look public

    def __getattr__(name: str) -> Any:
        """Import the module that defines a public name (PEP 562), and keep the name as an attribute."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


class _Package(ModuleType):
    """Keeps ``plan`` and ``verify`` functions, although Python binds the modules of these names here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
