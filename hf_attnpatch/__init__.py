"""Swap the attention or the positions of a pretrained transformers model, exactly and reversibly."""

__version__ = "0.1.0.dev0"
