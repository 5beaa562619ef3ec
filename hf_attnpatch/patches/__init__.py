"""One file per method: reads the anatomy, yields edits, touches nothing."""

from .alibi import Alibi
from .flash import Flash
from .grouped_query import GroupedQuery
from .rope_scaling import RopeScaling

__all__ = ["Alibi", "Flash", "GroupedQuery", "RopeScaling"]
