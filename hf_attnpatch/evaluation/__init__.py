"""Measurements of a model, patched or not: nothing here depends on patches."""

from .cache import cache_bytes_per_token
from .decoding import Decoding, DecodingAt, decoding
from .fidelity import Fidelity, fidelity
from .harness import Metric, TaskScores, task_scores
from .layers import LayerDifference, layer_difference
from .losses import document_losses, mean_loss
from .perplexity import LossByLength, perplexity
from .positions import LossByPosition, loss_by_position
from .recurrence import document_tokens, recurrence
from .result import Result
from .retrieval import Retrieval, find_task, retrieval
from .score import Interval, Losses, Score, difference, summarise

__all__ = [
    "Decoding",
    "DecodingAt",
    "Fidelity",
    "Interval",
    "LayerDifference",
    "LossByLength",
    "LossByPosition",
    "Losses",
    "Metric",
    "Result",
    "Retrieval",
    "Score",
    "TaskScores",
    "cache_bytes_per_token",
    "decoding",
    "difference",
    "document_losses",
    "document_tokens",
    "fidelity",
    "find_task",
    "layer_difference",
    "loss_by_position",
    "mean_loss",
    "perplexity",
    "recurrence",
    "retrieval",
    "summarise",
    "task_scores",
]
