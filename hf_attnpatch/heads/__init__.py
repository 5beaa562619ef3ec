"""Conversion to shared key-value heads: calibration, grouping, merging, refitting, refinement and the edits."""
