"""The edits by which positions come to be added to what the token embedding gives."""

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
    """Return the edits that give the language model a child whose positions are added to its embeddings.

    Args:
        model: any model.
        anatomy: its.
        make: builds the child from the language model.
        after: text for the report.

    Raises:
        UnsupportedArchitecture: no one language model takes embeddings in the place of ids.
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
            f"{anatomy.architecture}: decodes from a state that does not say how many tokens it has seen, so that "
            "positions cannot be counted on."
        )
    if CHILD in base._modules:  # of an earlier patch; its hook is there, too
        return (ReplaceModule(f"{anatomy.base}.{CHILD}".lstrip("."), lambda _: make(base), after),)
    hook = AddPreHook(anatomy.base, AddPositions(roles), "adds positions to the embeddings")
    return (AddModule(anatomy.base, CHILD, make, after), hook)


def check_adding(
    model: PreTrainedModel, anatomy: Anatomy, away: Sequence[Edit], blind: Sequence[Edit], whole: Sequence[Edit]
) -> None:
    """Refuse a model that needs the ids themselves beside their embeddings.

    Args:
        model: any model.
        anatomy: its.
        away: edits that take the old positions out, but for what is added already.
        blind: edits that take out that, too.
        whole: edits that take the old positions out and add the new ones.

    Raises:
        UnsupportedArchitecture: embeddings to which nothing is added give other logits than the ids, or other tokens.
    """
    inputs = default_inputs(model)
    nothing = adding(model, anatomy, lambda _: SinusoidalPositions(10000.0, 0.0, 1.0), "")
    try:
        found = logits_under(model, [*away, *nothing], inputs)
        problem = disagreement(logits_under(model, blind, inputs), found)
        logits_under(model, whole, inputs)
        something = adding(model, anatomy, lambda _: SinusoidalPositions(10000.0, 1.0, 1.0), "")
        logits_under(model, [*away, *something], inputs)  # some look their ids up again, by the very embeddings
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
    """Say how ``generate`` fares with embeddings where it does with ids, in a model that hands no cache back.

    Such a model is handed the whole text again for each token. Some fill the cache that ``generate`` passes and cut
    the ids by its length, which they do not do with embeddings (XLM).
    """
    if not model.can_generate():
        return None
    with quiet(model), torch.no_grad():
        if resumed(model, model(**inputs, **roles_of(model).call(**{words.USE_CACHE: True}))):
            return None  # apply asks about that cache
        wanted, _ = _written(model, ids, inputs)
        if wanted is None:
            return None  # from ids it writes nothing either
        found, why = _written(model, embeddings, inputs)
    if found is None:
        return f"generate fails with them: {why}"
    return None if torch.equal(wanted, found) else "generate writes other tokens"


def _written(model: PreTrainedModel, edits: Sequence[Edit], inputs: Inputs) -> tuple[Tensor | None, str]:
    """Return what an edited model writes behind the default tokens, or why it writes nothing."""
    with tried(model, edits):
        try:
            text = model.generate(tokens_of(model, inputs), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
            return None, " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return text, ""
