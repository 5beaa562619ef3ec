"""Segment recurrence: memory of earlier segments, and streams."""
