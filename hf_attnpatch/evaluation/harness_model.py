"""The model adapter for lm-eval; imported only if lm-eval is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from ..errors import EvaluationError


class WholeExamples(HFLM):  # type: ignore[misc]  # lm-eval is an extra, unknown to the type checker
    """lm-eval's model, which refuses truncation and NaN logits.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        max_length: tokens of an example and its answer, at most.
        batch: examples in a forward pass.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, batch: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score answers, none of them without its whole example."""
        # the last token of the answer is predicted, not read: one more than the length is whole
        sizes = [sum(map(len, self._encode_pair(*r.args))) if r.args[0] else 0 for r in requests]
        self._check(requests, sizes, self.max_length + 1)
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers, each after its whole example and with room for all of it."""
        room = [int(r.args[1].get("max_gen_toks", self.max_gen_toks)) for r in requests]
        sizes = [len(self.tok_encode(r.args[0])) + more for r, more in zip(requests, room, strict=True)]
        self._check(requests, sizes, self.max_length)
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def _check(self, requests: Sequence[Instance], sizes: Sequence[int], limit: int) -> None:
        long = [(size, request) for size, request in zip(sizes, requests, strict=True) if size > limit]
        if long:
            size, request = max(long, key=lambda pair: pair[0])
            raise EvaluationError(
                f"task {request.task_name}, example {request.doc_id}: {size} tokens with its answer, and max_length is "
                f"{self.max_length}; {len(long)} of {len(requests)} requests are too long, and none is cut off here: "
                "give a larger max_length if the model takes it, or a limit or fewer solved examples."
            )

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *arguments, **options)
        _refuse_nan(logits)
        return logits

    def _model_generate(self, context: Tensor, **options: Any) -> Tensor:
        found: Tensor = super()._model_generate(context, logits_processor=[_no_nan], **options)
        return found


def _no_nan(_: Tensor, scores: Tensor) -> Tensor:
    _refuse_nan(scores)
    return scores


def _refuse_nan(logits: Tensor) -> None:
    bad = torch.isnan(logits).flatten(1).any(dim=1).nonzero()
    if len(bad):
        raise EvaluationError(
            f"row {int(bad[0])} of a batch of {len(logits)}: logits that are NaN; look at the model's weights."
        )
