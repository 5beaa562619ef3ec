"""A wrapper that records attention calls while a model is analysed."""

from __future__ import annotations

from collections.abc import Callable

from .call import AttentionCall, Output
from .wrapper import Wrapper


class Listener(Wrapper):
    """Records the attention calls of one module and changes nothing."""

    name, order = "listener", -1

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Record the call."""
        self.calls.append(call.but(call.query.detach(), call.key.detach(), call.value.detach()))
        return inner(call)
