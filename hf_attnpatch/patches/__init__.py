"""The patches, one file per method. Each reads the anatomy and returns edits; none writes to a model."""

from .alibi import Alibi
from .attention_sinks import AttentionSinks
from .dual_chunk import DualChunk
from .flash import Flash
from .grouped_query import GroupedQuery
from .jet_long import JetLong
from .latent import Latent
from .no_position import NoPosition
from .position_table import PositionTable
from .re_rope import ReRope
from .relative_xl import RelativeXl
from .rope_scaling import RopeScaling
from .rotary import Rotary
from .score_temperature import ScoreTemperature
from .segment_recurrence import SegmentRecurrence
from .self_extend import SelfExtend
from .sinusoidal import Sinusoidal
from .windowed import Windowed

__all__ = [
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
]
