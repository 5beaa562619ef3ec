"""The attention functions of spans, under their names in transformers' registries."""

from __future__ import annotations

from ..backends import register
from . import attention as span_attention
from .modules import PREFIX

BACKENDS = ("auto", "sdpa", "eager")


def register_spans() -> None:
    """Make them known, each with the masks that it understands."""
    register(PREFIX + "sdpa", span_attention.sdpa, span_attention.place_mask)
    register(PREFIX + "eager", span_attention.eager, span_attention.eager_place_mask)
