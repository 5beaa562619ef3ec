"""Whether a model passes learned sinks to its attention, found by listening."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..attention.registry import KERNELS, kernel_of, set_kernel
from ..attention.wrapper import AddWrapper, Listener
from ..edits import Edit
from ..probe import default_inputs, logits_under
from ..upstream import words


def passes_sinks(model: PreTrainedModel, paths: Sequence[str]) -> bool:
    """Return whether attention modules pass learned sinks, and their family declares no kernel of torch's.

    Args:
        model: that can run; it is left as it is. Families that declare such a kernel are not run.
        paths: of its attention modules, which dispatch.
    """
    kernel = kernel_of(str(model.config._attn_implementation))
    if getattr(model, words.DECLARES_SDPA, False) or not paths or kernel not in KERNELS:
        return False
    listeners = [Listener() for _ in paths]
    edits: list[Edit] = [AddWrapper(path, listener) for path, listener in zip(paths, listeners, strict=True)]
    logits_under(model, [*edits, set_kernel(kernel)], default_inputs(model))
    return any(call.given.get(words.SINKS) is not None for listener in listeners for call in listener.calls)
