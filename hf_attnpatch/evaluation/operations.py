"""The operations of a model at a length, one by one, without computing them.

The model is copied with parameters that have shapes and no data (torch's fake tensors), and run; every operation that
torch is asked for is noted with what it reads, writes and multiplies. So the list is of this model, patched or not,
with the attention that it is set to: repeated key-value heads, masks and the cache's own copies are there because they
happen, not because a table of families says so.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from ..errors import EvaluationError
from ..upstream import words
from ..upstream.caches import overriding
from ..upstream.roles import roles_of, run
from .announcing import announced
from .listener import Listener, Pass
from .memory import held_bytes


class Phantom:
    """A copy of a model with shapes and without data.

    Args:
        model: a transformers model, on any device and without weights too; not touched.

    Raises:
        EvaluationError: an encoder and a decoder in one, which need two inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mode = FakeTensorMode()
        with self.mode:
            self.model = without_data(model, "cpu", attributes=True)
        self.kind = type(model).__name__
        self.takes = set(inspect.signature(model.forward).parameters)
        self.roles = roles_of(self.model)
        if getattr(model.config, "is_encoder_decoder", False) and self.roles.takes(words.DECODER_TOKENS):
            raise EvaluationError(
                f"{self.kind} is an encoder and a decoder in one; only models that read one sequence are costed here."
            )

    @property
    def decodes(self) -> bool:
        """Whether it takes keys and values of earlier tokens."""
        return self.roles.takes(words.CACHE, words.USE_CACHE)

    def forward(self, batch: int, context: int) -> Pass:
        """Return a pass over a whole context that computes the logits of the last token only, where it can."""
        return self._inference(batch, context)[0]

    def decode(self, batch: int, context: int) -> tuple[Pass, Pass]:
        """Return the pass that fills a cache with ``context`` tokens, and the one that adds a token to it.

        Raises:
            EvaluationError: the model keeps no keys and values.
        """
        if not self.decodes:
            raise EvaluationError(f"{self.kind} takes no cache, so it does not decode with a cache.")
        return self._inference(batch, context)

    def training(self, batch: int, context: int) -> Pass:
        """Return forward and backward of the mean loss over a whole context, without the optimizer's step."""
        self.model.train()
        with self._explained(), self.mode:
            ids = torch.zeros(batch, context, dtype=torch.long)
            given: dict[str, Any] = {words.TOKENS: ids}
            given |= {words.USE_CACHE: True, words.CACHE: _Passing(config=self.model.config)} if self.decodes else {}
            labels = {"labels": ids} if "labels" in self.takes else {}
            with self._listening(context, context) as seen:
                out = run(self.model, given, **labels)
                loss = out.loss if getattr(out, "loss", None) is not None else out[0].float().mean()
                loss.backward()
        self.model.zero_grad(set_to_none=True)
        return seen.done(0)

    def _inference(self, batch: int, context: int) -> tuple[Pass, Pass]:
        self.model.eval()
        with self._explained(), self.mode, torch.no_grad(), announced(self.model, context + 1):
            ids = torch.zeros(batch, context, dtype=torch.long)
            cache = _Watched(config=self.model.config) if self.decodes else None
            state: dict[str, Any] = {words.CACHE: cache, words.USE_CACHE: True} if self.decodes else {}
            more = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
            passes: list[Pass] = []
            for tokens in (ids, ids[:, :1])[: 2 if self.decodes else 1]:
                keys = context + len(passes)
                with self._listening(tokens.shape[1], keys, cache) as seen:
                    run(self.model, {words.TOKENS: tokens, **state}, **more)
                passes.append(seen.done(held_bytes(cache) if cache is not None else 0))
        return passes[0], passes[-1]

    @contextmanager
    def _listening(self, queries: int, keys: int, cache: _Watched | None = None) -> Iterator[Listener]:
        listener = Listener(self.model, queries, keys, cache)
        with listener:
            yield listener

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            what = " ".join(str(error).split())[:120]
            raise EvaluationError(
                f"{self.kind} cannot be followed on tensors without data ({what}): what it does next depends on their "
                "values, or torch does not know the shapes of one of its operations. Measure it instead: "
                "hf_attnpatch.evaluation.decoding(model, contexts=...)."
            ) from error


def without_data(model: nn.Module, device: str = "meta", *, attributes: bool = False) -> Any:
    """Return a deep copy in which every parameter and buffer is empty and on ``device``, tied ones still tied.

    Args:
        model: not touched.
        device: of the copy.
        attributes: whether tensors that modules keep as plain attributes lose their data as well.
    """
    plain = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)] if attributes else []
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), *plain):
        empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


@overriding("costing a decode step")
class _Watched(DynamicCache):  # type: ignore[misc]  # transformers is not followed
    """The cache that ``generate`` makes; it announces its updates."""

    updating = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.updating = True
        try:
            return super().update(*args, **kwargs)
        finally:
            self.updating = False


@overriding("costing a training step")
class _Passing(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing: without one, transformers notices fake tensors and makes extra masks."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states
