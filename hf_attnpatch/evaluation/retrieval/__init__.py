"""Retrieval from long context: passkey, needle, key-value pairs, and RULER's tasks that need no download."""

from .examples import DEPTHS, TASKS, Example, examples, find_task
from .measure import Answer, Retrieval, retrieval
from .task import Task, first_number, string_match_all

__all__ = [
    "DEPTHS",
    "TASKS",
    "Answer",
    "Example",
    "Retrieval",
    "Task",
    "examples",
    "find_task",
    "first_number",
    "retrieval",
    "string_match_all",
]
