"""Reads a written checkpoint again and compares it with the model in memory."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, TypeAlias

from torch import Size, Tensor, dtype
from transformers import PreTrainedModel

from ..errors import AttnPatchError
from .files import digest, sample

Marks: TypeAlias = Mapping[str, tuple[dtype, tuple[Size, bytes]]]


def marks_of(model: PreTrainedModel, sampled: Container[str] = ()) -> Marks:
    """Return what tells the tensors of a model, by name, from others; it holds none of them.

    Args:
        model: patched.
        sampled: names of tensors whose bytes were copied from file to file, of which some numbers are enough.
    """
    state: Mapping[str, Any] = model.state_dict()
    held = {name: t for name, t in state.items() if isinstance(t, Tensor) and not t.is_meta}
    return {n: (t.dtype, (t.shape, digest(sample(t) if n in sampled else t)[1])) for n, t in held.items()}


def check_reread(wanted: Marks, found: Marks) -> None:
    """Compare a checkpoint, as it loads, with the model that it was written from.

    Raises:
        AttnPatchError: a tensor came back as something else, or not at all.
    """
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise AttnPatchError(
            f"what was written was read again, and {wrong[0]}{more} came back as something else: this transformers "
            "does not load what it saves of this model. Nothing is kept; please report it, with the model's name."
        )
