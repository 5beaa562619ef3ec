"""What stands before ``generate`` on a model whose angles are chosen per request: it finds how long they will become.

Two instance attributes, which revert takes away: one marks the call, the other reads the length where transformers has
just worked it out and every input is at hand. Neither copies anything of ``generate`` itself.
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
    """In the place of ``model.generate``: the class's own, with the call marked.

    Args:
        model: whose attribute it is; a copy of the model has a copy of this.
        requests: shared by the hooks of the model.
    """

    def __init__(self, model: PreTrainedModel, requests: Requests):
        self.model, self.requests = model, requests

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        with generating(self.requests):
            return type(self.model).generate(self.model, *args, **kwargs)


class PrepareCache:
    """In the place of ``model._prepare_cache_for_generation``, which is told how long the text may become."""

    def __init__(self, model: PreTrainedModel, requests: Requests):
        self.model, self.requests = model, requests

    def __call__(self, generation_config: Any, model_kwargs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Prepare the cache, and note the length of each row: all that it may become, its padding excepted."""
        longest = int(kwargs["max_cache_length"] if "max_cache_length" in kwargs else args[-1]) + 1
        mask = model_kwargs.get(roles_of(self.model).names.get(words.MASK, ""))
        padding = mask.eq(0).sum(-1).tolist() if isinstance(mask, Tensor) and mask.dim() == 2 else [0]
        drafts = bool(getattr(generation_config, "is_assistant", False))
        found_by_generate(self.requests, tuple(longest - n for n in padding), drafts)
        own = type(self.model)._prepare_cache_for_generation
        return own(self.model, generation_config, model_kwargs, *args, **kwargs)
