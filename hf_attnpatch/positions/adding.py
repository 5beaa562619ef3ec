"""Edits that add positions to the token embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..edits import AddModule, AddPreHook, Edit, ReplaceModule, tried
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..modules.added import CHILD, AddPositions, SinusoidalPositions
from ..probe import Inputs, default_inputs, disagreement, logits_under, quiet, tokens_of
from ..upstream import words
from ..upstream.roles import resumed, roles_of


def adding(
    model: PreTrainedModel, anatomy: Anatomy, make: Callable[[nn.Module], nn.Module], after: str
) -> tuple[Edit, ...]:
    """Return the edits that give the language model a child module whose positions are added to its embeddings.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        make: builds the child for a language model.
        after: text for the report.

    Raises:
        UnsupportedArchitecture: there is no single language model that takes embeddings instead of ids.
    """
    if model.config.is_encoder_decoder or anatomy.base is None:
        why = (
            "reads two sequences" if model.config.is_encoder_decoder else "has no inner model that takes inputs_embeds"
        )
        raise UnsupportedArchitecture(f"{anatomy.architecture}: {why}; positions cannot be added to its embeddings.")
    base = model.get_submodule(anatomy.base)
    roles = roles_of(base)
    counts = anatomy.sites or anatomy.unread or any("state" not in why for why in anatomy.other.values())
    if model.can_generate() and not (roles.takes(words.POSITIONS) or (roles.takes(words.CACHE) and counts)):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: decodes from a state that does not say how many tokens it has seen, so "
            "positions cannot be counted on."
        )
    if CHILD in base._modules:  # from an earlier patch, whose hook is there as well
        return (ReplaceModule(f"{anatomy.base}.{CHILD}".lstrip("."), lambda _: make(base), after),)
    hook = AddPreHook(anatomy.base, AddPositions(roles), "adds positions to the embeddings")
    return (AddModule(anatomy.base, CHILD, make, after), hook)


def check_adding(
    model: PreTrainedModel, anatomy: Anatomy, away: Sequence[Edit], blind: Sequence[Edit], whole: Sequence[Edit]
) -> None:
    """Refuse a model that needs the token ids in addition to their embeddings.

    Args:
        model: any model.
        anatomy: the model's anatomy.
        away: edits that remove the old positions, except those that are added already.
        blind: edits that remove those, too.
        whole: edits that remove the old positions and add the new ones.

    Raises:
        UnsupportedArchitecture: unchanged embeddings give other logits or other generated tokens than the ids.
    """
    inputs = default_inputs(model)
    nothing = adding(model, anatomy, lambda _: SinusoidalPositions(10000.0, 0.0, 1.0), "")
    try:
        found = logits_under(model, [*away, *nothing], inputs)
        problem = disagreement(logits_under(model, blind, inputs), found)
        logits_under(model, whole, inputs)
        something = adding(model, anatomy, lambda _: SinusoidalPositions(10000.0, 1.0, 1.0), "")
        logits_under(model, [*away, *something], inputs)  # some models recover the ids from the embeddings
        problem = problem or _generates_otherwise(model, blind, [*away, *nothing], inputs)
    except AttnPatchError as error:
        problem = str(error.__cause__ or error)
    if problem is not None:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: does not do with embeddings alone what it does with token ids ({problem}), so "
            "that positions cannot be added to them."
        )


def _generates_otherwise(
    model: PreTrainedModel, ids: Sequence[Edit], embeddings: Sequence[Edit], inputs: Inputs
) -> str | None:
    """Return how ``generate`` fails with embeddings where it works with ids, for a model that returns no cache.

    Such a model receives the whole text again for each token. Some fill the cache that ``generate`` passes and cut the
    ids, but not the embeddings, by its length (XLM).
    """
    if not model.can_generate():
        return None
    with quiet(model), torch.no_grad():
        if resumed(model, model(**inputs, **roles_of(model).call(**{words.USE_CACHE: True}))):
            return None  # the self-check of apply covers the cache
        wanted, _ = _written(model, ids, inputs)
        if wanted is None:
            return None  # it does not generate from ids either
        found, why = _written(model, embeddings, inputs)
    if found is None:
        return f"generate fails with them: {why}"
    return None if torch.equal(wanted, found) else "generate writes other tokens"


def _written(model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs) -> tuple[Tensor | None, str]:
    """Return what an edited model generates after the default tokens, or the reason why it generates nothing."""
    with tried(model, edits):
        try:
            text = model.generate(tokens_of(model, inputs), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            return None, " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return text, ""
