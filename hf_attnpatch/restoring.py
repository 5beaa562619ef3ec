"""Restores the structure of a patched checkpoint while it is loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from . import record
from .anatomy import describe
from .edits import whole_shapes
from .stacking import own
from .tested import warn_if_newer
from .weightless import restoring


def restore(model: PreTrainedModel) -> None:
    """Give a new model the structure that its config records; the weights follow from the checkpoint.

    Called by the constructors of :mod:`hf_attnpatch.foreign`; what the config alone expresses is in place already.
    """
    found = record.read(model.config)
    if found is None:
        return
    warn_if_newer()
    for patch in found.restore():
        with whole_shapes(model), restoring():
            edits = patch.propose(model, describe(model)).edits
            own(patch.name, edits)
            for edit in edits:
                edit.run(model)
