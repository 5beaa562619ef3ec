"""Prompts of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from ...errors import EvaluationError
from . import haystack, lists, needles
from .task import Draft, Setting, Task

TASKS: dict[str, Task] = {task.name: task for task in [*needles.TASKS, *lists.TASKS]}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FILLERS = (" so", " and", " .", ".", " ", "\n", "a")  # what follows noise words where these are too coarse
Encode = Callable[[str, str], list[int]]


@dataclass(frozen=True)
class Example:
    """A prompt and what its answer must contain.

    Attributes:
        length: tokens of prompt and answer together.
        depth: of the needle, or None.
        sample: its number.
        ids: the prompt: ``length`` less the room for the answer, within one token.
        answers: what the answer must contain.
        hidden: what is in the prompt whole.
    """

    length: int
    depth: float | None
    sample: int
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    hidden: tuple[str, ...]


def examples(
    tokenizer: Any,
    *,
    task: str,
    lengths: Sequence[int],
    depths: Sequence[float] | None = None,
    samples: int = 5,
    seed: int = 0,
    text: str | None = None,
    new_tokens: int | None = None,
    chat: bool = False,
) -> list[Example]:
    """Draw the prompts of a task; the same arguments give the same prompts.

    Args:
        tokenizer: of the model that is to be asked; lengths are counted by it.
        task: a name in ``TASKS``.
        lengths: tokens of prompt and answer together, as in RULER.
        depths: of the needle, 0 to 1; quarters unless given. Tasks without one needle take none.
        samples: prompts for each length and depth; a sample has the same needle at every depth.
        seed: of everything that is drawn.
        text: what tasks with an essay hide their needles in; the embedded held-out prose unless given.
        new_tokens: room for the answer; the published one unless given.
        chat: wrap the question in the tokenizer's chat template; the answer begins as without.

    Raises:
        EvaluationError: no such task, a depth where there is none, or a length that the task does not fit in.
    """
    kind = find_task(task)
    places = _depths(kind, depths)
    essay, room = essay_words(kind, text), kind.new_tokens if new_tokens is None else new_tokens
    encode = _encoder(tokenizer, chat)
    if not lengths or samples < 1 or room < 1:
        raise EvaluationError(
            f"task {task}: lengths={list(lengths)}, samples={samples}, new_tokens={room}; wanted some."
        )
    found = []
    for length in lengths:
        for depth in places:
            for sample in range(samples):
                setting = Setting(Random(f"{seed}/{task}/{length}/{sample}"), depth, length, essay)
                draft = kind.draft(setting)
                ids = _fitted(draft, encode, length - room, f"task {task}, length {length}, {room} for the answer")
                found.append(Example(length, depth, sample, tuple(ids), draft.answers, draft.hidden))
    return found


def find_task(task: str) -> Task:
    """Return a task by name.

    Raises:
        EvaluationError: there is none of this name.
    """
    if task not in TASKS:
        raise EvaluationError(f"task {task!r}: there is no such task; choose from {', '.join(TASKS)}.")
    return TASKS[task]


def essay_words(task: Task, text: str | None) -> Sequence[str]:
    """Return the words that a task hides needles in, or none.

    Raises:
        EvaluationError: the text has too few.
    """
    if not task.essay:
        return ()
    words = _prose() if text is None else tuple(text.split())
    if len(words) < 50:
        raise EvaluationError(f"task {task.name}: a text of {len(words)} words; wanted 50 or more to hide needles in.")
    return words


@cache
def _prose() -> tuple[str, ...]:
    from ...embedded import heldout

    return tuple(" ".join(heldout("prose")).split())


def _depths(task: Task, depths: Sequence[float] | None) -> Sequence[float | None]:
    if not task.by_depth:
        if depths:
            raise EvaluationError(f"task {task.name}: depths={list(depths)}, and it has no one needle; leave them out.")
        return (None,)
    places = DEPTHS if depths is None else depths
    if not places or not all(0 <= depth <= 1 for depth in places):
        raise EvaluationError(f"task {task.name}: depths={list(places)}; wanted one or more from 0 to 1.")
    return places


def _encoder(tokenizer: Any, chat: bool) -> Encode:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise EvaluationError(f"chat=True: {type(tokenizer).__name__} has no chat template; leave it out.")

    def encode(asked: str, begin: str) -> list[int]:
        if not chat:
            return list(tokenizer(asked + begin, verbose=False)["input_ids"])
        turn = [{"role": "user", "content": asked}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) + begin.lstrip()
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def _fitted(draft: Draft, encode: Encode, room: int, where: str) -> list[int]:
    """Return the prompt with as many units of haystack as fit, filled up to ``room`` tokens within one."""

    def ids(units: int, filler: str = "") -> list[int]:
        return encode(draft.build(units, filler), draft.begin)

    least = len(ids(draft.least))
    if least > room:
        raise EvaluationError(f"{where}: the shortest prompt has {least} tokens; wanted {room} or fewer: ask for more.")
    units = _most(lambda count: len(ids(draft.least + count)), room) + draft.least
    words = haystack.NOISE.split()
    line = [words[n % len(words)] for n in range(room - len(ids(units)))]
    count = _most(lambda count: len(ids(units, "".join(f" {word}" for word in line[:count]))), room, len(line))
    filler = "".join(f" {word}" for word in line[:count])
    for piece in _FILLERS:
        filler = _filled(lambda text: len(ids(units, text)), filler, piece, room)
    found = ids(units, filler)
    if not room - 1 <= len(found) <= room:
        raise EvaluationError(f"{where}: reached {len(found)} tokens, wanted {room} within one; try another length.")
    return found


def _filled(size: Callable[[str], int], filler: str, piece: str, room: int) -> str:
    """Return the filler with as many more of ``piece`` as fit."""
    return filler + piece * _most(lambda count: size(filler + piece * count), room, room - size(filler))


def _most(size: Callable[[int], int], room: int, limit: int | None = None) -> int:
    """Return a count that fits in ``room`` while the next one does not, by interpolation between counts tried.

    Raises:
        EvaluationError: no count is too large.
    """
    low, used, high, step = 0, size(0), (None if limit is None else limit + 1), 8
    each = 0.0
    while high is None or high - low > 1:
        guess = low + (max(1, int((room - used) / each)) if each > 0 else step)
        if high is not None:
            guess = min(max(guess, low + 1), high - 1)
        tokens = size(guess)
        if tokens > room:
            high = guess
            each = each and (tokens - used) / (guess - low)  # the estimate was too low
        elif limit is None and guess > max(room, 64):  # it would go on for ever
            raise EvaluationError(
                f"{guess} pieces of haystack are {tokens} tokens: the tokenizer drops text; give the model's own."
            )
        else:
            each = (tokens - used) / (guess - low) if tokens > used else 0.0
            low, used, step = guess, tokens, step * 2
    return low
