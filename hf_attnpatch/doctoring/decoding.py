"""Compares cached decoding with forwards of each text alone: no mask, no padding, no cache.

``generate`` passes the cache on by itself; in forwards of one's own :mod:`..stepwise` does. Where there is none, an
error says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..evaluation.announcing import announced
from ..interruption import removing
from ..probe import largest_difference
from ..stepwise import NoCache, in_pieces
from ..upstream import words
from ..upstream.roles import predicted, roles_of, run

LENGTHS = (20, 13)  # tokens of the texts; the second is left-padded
STEPS = 6  # tokens decoded after each
PIECES = (16, 1, 1, 2)  # of the first text, in forwards of one's own


@dataclass(frozen=True)
class Decoded:
    """The result of ``generate``.

    Attributes:
        difference: largest difference to the forwards without a cache, relative to their largest logit.
        held: most tokens that a layer of the cache holds at the end.
    """

    difference: float
    held: int


def texts(model: PreTrainedModel) -> list[Tensor]:
    """Return a text of ordinary tokens for each of :data:`LENGTHS`, (length,), on the CPU."""
    generator = torch.Generator().manual_seed(0)
    last = min(model.config.get_text_config(decoder=True).vocab_size, 99)
    return [torch.randint(5, last, (length,), generator=generator) for length in LENGTHS]


def alone(model: PreTrainedModel, text: Tensor, more: int = 0) -> Tensor:
    """Return the logits of a text, (length, vocabulary), in fp32 on the CPU, by its own forward.

    Args:
        model: in eval mode.
        text: shape (length,).
        more: tokens that its request will have beside these; angles may depend on that.
    """
    with torch.no_grad(), announced(model, len(text) + more):
        given = {words.TOKENS: text[None].to(model.device), words.USE_CACHE: False}
        return predicted(run(model, given))[0].float().cpu()


def generated(model: PreTrainedModel, prompts: Sequence[Tensor], steps: int = STEPS) -> Decoded:
    """Continue left-padded prompts by ``generate``, and compare the logits of every step.

    Raises:
        NoCache: a step was handed more than its own token.
    """
    with _sizes(model) as sizes:
        output = _generate(model, prompts, steps)
    if len(sizes) != steps or any(size != 1 for size in sizes[1:]):
        raise NoCache(f"generate handed {sizes} tokens to the forwards of {steps} steps: no cache was used", prompts[0])
    found = torch.stack([step.float().cpu() for step in output.logits], 1)  # rows, steps, vocabulary
    wanted = []
    for row, prompt in zip(output.sequences.cpu(), prompts, strict=True):
        whole = row[len(row) - len(prompt) - steps : -1]
        wanted.append(alone(model, whole, 1)[len(prompt) - 1 :])
    held = max(_lengths(output.values(), {id(output.logits)}), default=0)
    return Decoded(largest_difference(torch.stack(wanted), found), held)


def by_hand(model: PreTrainedModel, text: Tensor, pieces: Sequence[int] = PIECES) -> float:
    """Decode a text by forwards that pass on the cache, and return the largest difference.

    Nothing is said to the model but the tokens and the cache: no positions, no mask, no length of the request.

    Raises:
        NoCache: no field of the output is a cache.
    """
    ids = {roles_of(model).name(words.TOKENS): text[None].to(model.device)}
    with torch.no_grad():
        found = in_pieces(model, ids, pieces)[0].float().cpu()
    return largest_difference(alone(model, text), found)


def _generate(model: PreTrainedModel, prompts: Sequence[Tensor], steps: int) -> Any:
    width = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0), value=7) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    roles = {words.MASK: mask.to(model.device), words.USE_CACHE: True}
    with torch.no_grad():
        return model.generate(
            ids.to(model.device),
            **roles_of(model).call(**roles),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )


@contextlib.contextmanager
def _sizes(model: PreTrainedModel) -> Iterator[list[int]]:
    """Record how many tokens of a row each forward embeds."""
    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(output.shape[1])

    with removing() as handles:
        handles.append(model.get_input_embeddings().register_forward_hook(note))
        yield sizes


def _lengths(values: Any, seen: set[int]) -> Iterator[int]:
    """Yield the shapes of keys and values, (rows, heads, length, head size), in the caches among some values."""
    for value in values:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.dim() == 4:
                yield value.shape[2]
        elif isinstance(value, dict):
            yield from _lengths(value.values(), seen)
        elif isinstance(value, (list, tuple)):
            yield from _lengths(value, seen)
        elif type(value).__module__.startswith(("transformers.cache_utils", __package__.partition(".")[0])):
            yield from _lengths(vars(value).values(), seen)
