"""Says how long a text will become to what is hooked onto a model and asks for it: angles may depend on the length."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn


def listener(model: nn.Module) -> Any:
    """Return the hook that wants to be told, by its method ``announced``; None where nothing depends on the length."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if hasattr(hook, "announced")), None)


def announced(model: nn.Module, tokens: int, past: Any = None) -> contextlib.AbstractContextManager[None]:
    """Say, for the forwards of a block, that so many tokens will follow what a cache holds."""
    hook, held = listener(model), past.get_seq_length() if hasattr(past, "get_seq_length") else 0
    found: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    return found if hook is None else hook.announced(int(held) + tokens)
