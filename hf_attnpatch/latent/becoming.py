"""The edit by which a model becomes one with latent attention, and where its new weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from ..edits import BecomeModel
from .conversion import Budget, Conversion, How, convert
from .home import Home, become, lossless_shape, lossless_weights, stored
from .source import Source


@dataclass
class Weights:
    """Where the new weights come from: worked out before, or as they are written.

    Attributes:
        source: what was read of the model.
        home: that it becomes.
        budget: of the cache; None to lose nothing.
        conversion: set by ``apply``, before the first edit, where there is a budget.
    """

    source: Source
    home: Home
    budget: Budget | None
    conversion: Conversion | None = field(default=None, repr=False)

    def release(self) -> None:
        """Let go of the converted weights, which are in the model by now."""
        self.conversion = None

    def edit(self, after: str) -> BecomeModel:
        """Return the edit, with a text for the report."""
        return BecomeModel("", self, self.home.row.model_type, after, rewrites=True)

    def __call__(self, model: PreTrainedModel) -> PreTrainedModel:
        """Build the model with latent attention around all other parameters of this one."""
        source = self.source
        if self.budget is None:
            shape = lossless_shape(model, source)
            found = {s.path: lossless_weights(model, source, s.path) for s in source.sites}
        else:
            done = self.conversion or convert(model, source, self.home, self.budget, _QUICK, None)
            assert done.shape is not None
            shape, found = done.shape, done.weights
        tensors: dict[str, dict[str, Tensor]] = {}
        for site in source.sites:
            dtype = next(iter(model.get_submodule(site.path).parameters())).dtype
            tensors[site.path] = stored(shape, found.pop(site.path), model, site.path, dtype)
        return become(model, source, self.home, shape, tensors)


_QUICK = How("principal", 0, 0, None)  # for structure alone
