"""Tells length-dependent hooks (per-request RoPE) the final sequence length."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn


def listener(model: nn.Module) -> Any:
    """Return the hook with a method ``announced``; None if nothing depends on the length."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if hasattr(hook, "announced")), None)


def announced(model: nn.Module, tokens: int, past: Any = None) -> contextlib.AbstractContextManager[None]:
    """Announce, for the forwards of a block, that this many tokens follow those in a cache."""
    hook, held = listener(model), past.get_seq_length() if hasattr(past, "get_seq_length") else 0
    found: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    return found if hook is None else hook.announced(int(held) + tokens)
