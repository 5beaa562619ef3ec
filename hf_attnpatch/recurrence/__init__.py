"""Segment recurrence: a memory of earlier segments, and streams that carry it across calls."""
