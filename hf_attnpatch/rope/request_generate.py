"""Wraps ``generate`` of a model with per-request angles, to find how long its requests will become.

Two instance attributes, which revert removes: one marks the call, the other reads the length right after transformers
computes it. Neither copies code of ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..upstream import words
from ..upstream.roles import roles_of
from .request_length import Requests, found_by_generate, generating


class Generate:
    """Replaces ``model.generate``: calls the class's own and marks the call.

    Args:
        model: whose attribute this is; a copy of the model has its own copy.
        requests: shared by the hooks of the model.
    """

    def __init__(self, model: PreTrainedModel, requests: Requests):
        self.model, self.requests = model, requests

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        with generating(self.requests):
            return type(self.model).generate(self.model, *args, **kwargs)


class PrepareCache:
    """Replaces ``model._prepare_cache_for_generation``, which receives the final length."""

    def __init__(self, model: PreTrainedModel, requests: Requests):
        self.model, self.requests = model, requests

    def __call__(self, generation_config: Any, model_kwargs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare the cache, and store the final length of each row without its padding."""
        longest = int(kwargs["max_cache_length"] if "max_cache_length" in kwargs else args[-1]) + 1
        mask = model_kwargs.get(roles_of(self.model).names.get(words.MASK, ""))
        padding = mask.eq(0).sum(-1).tolist() if isinstance(mask, Tensor) and mask.dim() == 2 else [0]
        drafts = bool(getattr(generation_config, "is_assistant", False))
        found_by_generate(self.requests, tuple(longest - n for n in padding), drafts)
        own = type(self.model)._prepare_cache_for_generation
        return own(self.model, generation_config, model_kwargs, *args, **kwargs)
