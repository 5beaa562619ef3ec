"""What `extend_context.py` and `switch_positions.py` share: a study's cells, how one is trained and measured."""
