"""Common parts of `extend_context.py` and `switch_positions.py`: a study's cells, their training and measurement."""
