"""The structure of a patched checkpoint, given to a model that is being loaded."""

from __future__ import annotations

from transformers import PreTrainedModel

from . import record
from .anatomy import describe
from .edits import whole_shapes
from .stacking import own
from .tested import warn_if_newer
from .weightless import restoring


def restore(model: PreTrainedModel) -> None:
    """Give a freshly built model the structure its config records; the weights come from the checkpoint.

    Called by the constructors of :mod:`hf_attnpatch.foreign`; steps that the config alone expresses are there already.
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
