"""Decodes a text in pieces through a cache, for a comparison with the full forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import AttnPatchError
from .upstream import words
from .upstream.roles import predicted, resumed, roles_of

# After the prefill: two steps of one token, then two tokens at once, which must see each other.
STEPS = (1, 1, 2)


class NoCache(AttnPatchError):
    """A model that generates returns no cache to continue from.

    Attributes:
        found: predictions for all tokens, each piece read by itself: correct if modules keep their own state.
    """

    def __init__(self, message: str, found: Tensor):
        super().__init__(message)
        self.found = found


def in_pieces(
    model: nn.Module, inputs: Mapping[str, Tensor], sizes: Sequence[int], seen: Callable[[Any], None] | None = None
) -> Tensor:
    """Return the predictions for all tokens, (batch, length, ...), read through a cache in pieces of these sizes.

    Args:
        model: a decoder, or an encoder-decoder, of which the second sequence is cut.
        inputs: of the forward, by its own names, optionally with a mask and positions of all tokens. Inputs other than
            text go with the first piece.
        sizes: tokens of each piece, together the whole length.
        seen: called with the last cache.

    Raises:
        NoCache: the forward returns no cache that it accepts again.
    """
    roles = roles_of(model)
    both = roles.names.get(words.DECODER_TOKENS) in inputs
    stream = roles.name(words.DECODER_TOKENS if both else words.TOKENS)
    mask, positions = roles.names.get(words.MASK, ""), roles.names.get(words.POSITIONS, "")
    state: dict[str, Any] = {}
    text = {roles.names.get(role) for role in (words.TOKENS, words.MASK, words.POSITIONS)}
    each = {stream: inputs[stream]}  # inputs with one number for each token
    if not both:
        alike = {name: t for name, t in inputs.items() if t.shape == inputs[stream].shape and name not in text}
        each |= alike
    beside = not both and set(inputs) - set(each) - text  # images, which are read once
    found, start, returned = [], 0, False
    for size in sizes:
        end = start + size
        kept = {name: t for name, t in inputs.items() if both or not state or name in text or not beside}
        piece = {**kept, **{name: t[:, start:end] for name, t in each.items() if name in kept}}
        if positions in inputs:
            piece[positions] = inputs[positions][..., start:end]
        if mask in inputs and not both:
            piece[mask] = inputs[mask][:, 0 if state else start : end]  # without a cache, for the piece only
        output = model(**piece, **roles.call(**{words.USE_CACHE: True}), **state)
        state = resumed(model, output)
        returned = returned or bool(state)
        found.append(predicted(output))
        start = end
    if not returned:
        said = f"{roles.owner}: its forward was asked for a cache, and returned none that it takes again."
        raise NoCache(said, torch.cat(found, 1))
    if seen is not None:
        seen(next(iter(state.values())))
    return torch.cat(found, 1)


def unmasked(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop a mask that hides nothing: some models count the positions of a later piece by the whole mask."""
    mask = roles_of(model).names.get(words.MASK)
    return {name: t for name, t in inputs.items() if name != mask or not t.all()}


def rereads(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether ``generate`` reads the whole text again for each token, which proves that there is no cache.

    Args:
        model: a model that can generate.
        inputs: of its forward, by its own names, without padding.
    """
    roles, lengths = roles_of(model), Counter[int]()
    stream = roles.name(words.DECODER_TOKENS if roles.names.get(words.DECODER_TOKENS) in inputs else words.TOKENS)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = roles.bind(args, kwargs).named.get(stream)
        lengths[0 if given is None else given.shape[-1]] += 1

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
    return len(lengths) == 3 and min(lengths) > 1


def remembers(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Return whether modules keep tensors between forwards, beside what the model returns.

    Args:
        model: a model that can generate; the caller restores its state.
        inputs: of its forward, by its own names, without padding.
    """
    before = _held(model)
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return _held(model) != before


def _held(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(v)) for m in model.modules() for name, v in vars(m).items() if isinstance(v, Tensor)]


def writes_as_it_reads(model: PreTrainedModel, inputs: Mapping[str, Tensor], tokens: int = 4) -> bool:
    """Return whether greedy ``generate`` gives the tokens that full forwards without a cache predict.

    Args:
        model: a model that can generate.
        inputs: token ids alone, by the model's own name, without padding.
        tokens: number of tokens to generate.
    """
    (name, ids), roles = next(iter(inputs.items())), roles_of(model)
    written = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    text = written[:, : ids.shape[1] + tokens]
    wanted = predicted(model(**{name: text[:, :-1]}, **roles.call(**{words.USE_CACHE: False})))[:, -tokens:].argmax(-1)
    return torch.equal(text[:, -tokens:], wanted)


__all__ = ["STEPS", "NoCache", "in_pieces", "remembers", "rereads", "unmasked", "writes_as_it_reads"]
