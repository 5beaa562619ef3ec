"""Read a text in pieces through a cache, as decoding does, to compare it with the full forward."""

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

# After the prefill: two steps of one token, then two tokens at once, which have to see each other.
STEPS = (1, 1, 2)


class NoCache(AttnPatchError):
    """A model that generates gives back nothing to go on from."""


def in_pieces(
    model: nn.Module, inputs: Mapping[str, Tensor], sizes: Sequence[int], seen: Callable[[Any], None] | None = None
) -> Tensor:
    """Return the predictions for all tokens, (batch, length, ...), fed in pieces of these sizes through a cache.

    Args:
        model: a decoder, or an encoder-decoder, of which the second sequence is cut.
        inputs: of its forward, by its own names; a mask and positions of all tokens among them, or none.
        sizes: tokens of each piece, together the whole length.
        seen: is shown the last cache.

    Raises:
        NoCache: the forward returns no cache that it would take again.
    """
    roles = roles_of(model)
    both = roles.names.get(words.DECODER_TOKENS) in inputs
    stream = roles.name(words.DECODER_TOKENS if both else words.TOKENS)
    mask, positions = roles.names.get(words.MASK, ""), roles.names.get(words.POSITIONS, "")
    state: dict[str, Any] = {}
    found, start = [], 0
    for size in sizes:
        end = start + size
        piece = {**inputs, stream: inputs[stream][:, start:end]}
        if positions in inputs:
            piece[positions] = inputs[positions][..., start:end]
        if mask in inputs and not both:
            piece[mask] = inputs[mask][:, :end]
        output = model(**piece, **roles.call(**{words.USE_CACHE: True}), **state)
        state = resumed(model, output)
        if not state:
            raise NoCache(f"{roles.owner}: its forward was asked for a cache, and returned none that it takes again.")
        found.append(predicted(output))
        start = end
    if seen is not None:
        seen(next(iter(state.values())))
    return torch.cat(found, 1)


def rereads(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> bool:
    """Whether ``generate`` reads the whole text again for each token: the proof that a model keeps no cache.

    Args:
        model: that can generate.
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


__all__ = ["STEPS", "NoCache", "in_pieces", "rereads"]
