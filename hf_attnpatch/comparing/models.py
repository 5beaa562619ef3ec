"""The two models of a comparison: loading, comparability, and facts for the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from .. import record
from ..checkpoint import load, tokenizer_of
from ..errors import AttnPatchError, EvaluationError
from ..evaluation import cache_bytes_per_token
from . import texts

Named: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def loaded(model: Named, loading: Mapping[str, Any], say: Callable[[str], None]) -> PreTrainedModel:
    """Return a model, loaded if a name was given.

    Raises:
        AttnPatchError: it is neither, or cannot be loaded.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise AttnPatchError(f"compare: a {type(model).__name__} is no model; give one, or the name of a checkpoint.")
    say(f"loading {model}")
    return load(model, **{"dtype": "auto", **loading}).eval()


def tokenizer_for(models: Mapping[str, PreTrainedModel], loading: Mapping[str, Any]) -> Any:
    """Return the tokenizer of both models, from where they were loaded.

    Raises:
        EvaluationError: there is none, or there are two that differ.
    """
    trust = {"trust_remote_code": bool(loading.get("trust_remote_code"))}
    found = {which: tokenizer_of(name, **trust) for which, m in models.items() if (name := record.loaded_from(m))}
    there = [each for each in found.values() if each is not None]
    if not there:
        raise EvaluationError("neither checkpoint has a tokenizer; give the one that both models use: tokenizer=...")
    if len(there) == 2:
        texts.check_same(*there)
    return there[0]


def context(model: PreTrainedModel) -> int | None:
    """Return the context that a model declares, in tokens."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def about(model: PreTrainedModel, digest: str, name: str) -> dict[str, Any]:
    """Return the facts about a model for the report."""
    found = record.read(model.config)
    return {
        "name": name,
        "digest": digest,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": context(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache_bytes_per_token": _cache(model),
        "record": found.to_dict() if found else None,
    }


def _cache(model: PreTrainedModel) -> float | None:
    """Return the cache bytes per token, or None for a model without keys and values."""
    try:
        return cache_bytes_per_token(model)
    except EvaluationError:
        return None


def check_vocabulary(original: PreTrainedModel, patched: PreTrainedModel) -> None:
    """Check that two models give logits over the same tokens.

    Raises:
        EvaluationError: they have other numbers of tokens.
    """
    sizes = [m.get_input_embeddings().weight.shape[0] for m in (original, patched)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"the models have {sizes[0]:,} and {sizes[1]:,} tokens in their vocabulary; only models of one vocabulary "
            "can be compared token by token."
        )
