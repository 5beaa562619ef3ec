"""One file per method: reads the anatomy, yields edits, touches nothing."""

from .alibi import Alibi
from .flash import Flash
from .grouped_query import GroupedQuery
from .no_position import NoPosition
from .position_table import PositionTable
from .rope_scaling import RopeScaling
from .rotary import Rotary
from .segment_recurrence import SegmentRecurrence
from .sinusoidal import Sinusoidal

__all__ = [
    "Alibi",
    "Flash",
    "GroupedQuery",
    "NoPosition",
    "PositionTable",
    "RopeScaling",
    "Rotary",
    "SegmentRecurrence",
    "Sinusoidal",
]
