"""Wrappers that try windows on a model, or listen to what a window would take away; for rows without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Output
from ..attention.wrapper import Wrapper
from ..functional import sinking
from ..functional.sinking import bands
from ..upstream import words


class Narrowed(Wrapper):
    """Lets a module see a window.

    Args:
        window: last tokens that a query sees, itself among them.
        first: tokens at the beginning of a row that it sees as well.
        sinks: scores that stand for what is not seen, one for each head; None for none.

    Attributes:
        active: whether it does so now.
    """

    name, order = "window", 2

    def __init__(self, window: int, first: int = 0, sinks: Tensor | None = None):
        self.window, self.first, self.sinks, self.active = window, first, sinks, True

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Attend to the window."""
        length = call.key.shape[2]
        if not self.active or (length <= self.window and self.sinks is None):
            return inner(call)
        if self.sinks is None:
            at = torch.arange(length, device=call.query.device)
            gap = at[:, None] - at
            seen = (gap >= 0) & ((gap < self.window) | (at < self.first))
            return inner(call.masked(seen[None, None]))
        call.refuse("sinks", words.SINKS, words.SOFTCAP, words.SCORE_BIAS)
        tiles = bands(length, self.window, call.query.device)
        out = sinking.attend(call.query, call.key, call.value, self.sinks.to(call.query), tiles, call.scale)
        return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Heard:
    """What the queries of one module attend to from beyond a window.

    Attributes:
        window: log-sum-exp of the scores in the window, (heads, queries), fp64.
        first: the same of the first tokens, which are not in it.
    """

    window: Tensor
    first: Tensor


class Hearing(Wrapper):
    """Listens to one module; changes nothing.

    Args:
        window: as in :class:`Narrowed`.
        first: first tokens that are listened for.
    """

    name, order = "window", 2

    def __init__(self, window: int, first: int):
        self.window, self.first = window, first
        self.heard: list[Heard] = []

    def around(self, call: AttentionCall, inner: Callable[[AttentionCall], Output]) -> Output:
        """Listen to queries from which no first token is in the window."""
        query, key, length = call.query.detach(), call.key.detach(), call.key.shape[2]
        start = self.window + self.first - 1
        if length > start:
            log = sinking.logs(query, key, call.value.detach(), bands(length, self.window, query.device), call.scale)
            near = key[:, :, : self.first].repeat_interleave(query.shape[1] // key.shape[1], 1)
            scores = call.scale * query[:, :, start:].float() @ near.float().transpose(-1, -2)
            found = (log[:, :, start:], scores.logsumexp(-1))
            self.heard.append(Heard(*(t.transpose(0, 1).flatten(1).double().cpu() for t in found)))
        return inner(call)
