"""The decoding part of the self-check: a patched model must decode what its full forward computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .edits import tried
from .errors import SelfCheckFailed
from .few import one_of_each
from .functional.finite import all_finite
from .invariants.noise import rounding
from .probe import Inputs, disagreement, largest_difference, quiet, valid
from .stepwise import STEPS, NoCache, in_pieces, remembers, rereads, unmasked, writes_as_it_reads
from .upstream import words
from .upstream.roles import predicted, roles_of

Promise = Callable[[Any], str | None]  # gets the cache of a decoded text, and returns what is wrong with it
_TEXT = (words.TOKENS, words.MASK, words.POSITIONS, words.DECODER_TOKENS)
NO_CACHE = "generate was seen to read the whole text again for each token: there is no cache to check"


def decoding(
    model: PreTrainedModel,
    inputs: Inputs,
    sites: Sequence[str],
    promises: Iterable[Promise] = (),
    steps: tuple[int, ...] = STEPS,
) -> tuple[str | None, str]:
    """Compare decoding with the full forward: a prefill, two single tokens and two at once, one row left-padded.

    Only the first layers run, as many as contain one of each kind; the whole model runs if they disagree, or if a
    promise concerns all layers.

    Args:
        model: patched or not; left as it was.
        sites: paths of all attention modules.
        inputs: of the forward; inputs other than text go with the first tokens.
        promises: the patches' checks of the cache.
        steps: tokens of each step after the prefill.

    Returns:
        What is wrong, or None; and the result in a few words.

    Raises:
        SelfCheckFailed: a promise is broken, or the model generates with a cache that was not found.
    """
    if not model.can_generate():
        return None, "the model does not generate"
    said = f"a prefill and steps of {' and '.join(map(str, dict.fromkeys(steps)))} tokens equal the full forward"
    short = None if promises else one_of_each(model, sites)
    if short is not None:
        with tried(model, [short]):
            problem, found = _asked(model, inputs, (), steps)
        if problem is None:
            return None, found or f"{said}, one row left-padded, in the first {short.count} of its layers"
    problem, found = _asked(model, inputs, promises, steps)
    return problem, found or f"{said}, one row left-padded"


def _asked(
    model: PreTrainedModel, inputs: Inputs, promises: Iterable[Promise], steps: tuple[int, ...]
) -> tuple[str | None, str]:
    roles = roles_of(model)
    text = {roles.names.get(role) for role in _TEXT}
    given = _placed(model, inputs) if set(inputs) <= text else inputs
    caches: list[Any] = []
    with quiet(model), torch.no_grad():
        try:
            wanted, found = _both(model, given, steps, caches)
        except NoCache as error:
            if _apart(model, given, _whole(model, given), error.found) is None:
                return None, "modules keep their own state, by which single steps equal the full forward"
            said = _without_a_cache(model, given)
            if said is None:
                raise SelfCheckFailed(
                    f"{error} Its cached decoding could not be checked; the model is unchanged."
                ) from error
            return None, said
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            text_of = " ".join(f"{type(error).__name__}: {error}".split())
            return f"decoding with a cache fails ({text_of[:200]})", ""
        problem = _apart(model, given, wanted, found)
    for promise in promises:
        broken = None if not caches else promise(caches[-1])
        if broken is not None:
            raise SelfCheckFailed(f"{broken}. The model is unchanged.")
    return problem, ""


def _without_a_cache(model: PreTrainedModel, given: Inputs) -> str | None:
    """Return how a model generates without returning a cache, if that is proved correct; else None."""
    roles = roles_of(model)
    ids = {roles.names.get(words.TOKENS), roles.names.get(words.DECODER_TOKENS)}
    hidden = {roles.names.get(words.MASK), roles.names.get(words.POSITIONS)}
    plain = {name: t for name, t in given.items() if name in ids or name not in hidden}
    alone = {name: t for name, t in plain.items() if name == roles.name(words.TOKENS)}
    try:
        if rereads(model, plain):
            return NO_CACHE
        if remembers(model, plain) and writes_as_it_reads(model, alone):
            return "modules keep their own state; the tokens of generate are those of full forwards"
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError):
        return None  # it does not generate from these inputs, which proves nothing
    return None


def decoded_with(model: PreTrainedModel, given: Inputs) -> str | None:
    """Return what is wrong with decoding inputs beside text, read with the first tokens; None if nothing is.

    Args:
        model: patched or not; left as it was.
        given: inputs of the forward, without padding.
    """
    roles = roles_of(model)
    if not model.can_generate() or not {roles.names.get(r) for r in (words.TOKENS, words.DECODER_TOKENS)} & set(given):
        return None
    given = unmasked(model, given)
    with quiet(model), torch.no_grad():
        try:
            wanted, found = _both(model, given, STEPS, [])
        except NoCache as error:
            wanted, found = _whole(model, given), error.found
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            text_of = " ".join(f"{type(error).__name__}: {error}".split())
            return f"decoding with a cache fails ({text_of[:200]})"
        return _apart(model, given, wanted, found)


def _placed(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs with positions as ``generate`` passes them, if the model takes positions and none are given."""
    roles = roles_of(model)
    mask = inputs.get(roles.names.get(words.MASK, ""))
    if mask is None or not roles.takes(words.POSITIONS) or roles.name(words.POSITIONS) in inputs:
        return dict(inputs)
    return {**inputs, roles.name(words.POSITIONS): (mask.cumsum(-1) - 1).clamp_min(0)}


def _both(model: PreTrainedModel, given: Inputs, steps: tuple[int, ...], caches: list[Any]) -> tuple[Tensor, Tensor]:
    """Return the predictions of the full forward, and of the same text fed in pieces."""
    roles = roles_of(model)
    stream = roles.names.get(words.DECODER_TOKENS, "")
    length = given[stream if stream in given else roles.name(words.TOKENS)].shape[-1]
    sizes = [length - sum(steps), *steps] if length > sum(steps) else [1] * length
    return _whole(model, given), in_pieces(model, given, sizes, caches.append)


def _whole(model: PreTrainedModel, given: Inputs) -> Tensor:
    return predicted(model(**given, **roles_of(model).call(**{words.USE_CACHE: False})))


def _apart(model: PreTrainedModel, given: Inputs, wanted: Tensor, found: Tensor) -> str | None:
    """Return how far both differ, or None if rounding explains it, by the usual tolerance or this model's own."""
    problem = disagreement(valid(model, wanted, given), valid(model, found, given))
    if problem is None or wanted.shape != found.shape or not all_finite(found):
        return problem
    apart = largest_difference(valid(model, wanted, given), valid(model, found, given))
    return None if apart <= rounding(model, lambda: predicted(model(**given))) else problem


__all__ = ["NO_CACHE", "Promise", "decoding"]
