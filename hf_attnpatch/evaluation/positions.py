"""Loss by position: where in its context does a model start to fail?"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from .. import charts
from ..errors import EvaluationError
from .result import Result
from .score import Losses, Score, summarise
from .windows import Documents, Window, read_documents, window_losses


@dataclass(frozen=True)
class LossByPosition(Result):
    """The loss of tokens by the number of tokens before them.

    Attributes:
        edges: bin ``i`` holds the tokens at positions ``edges[i]`` to ``edges[i + 1] - 1``; the first token of a
            document has position 0 and is never predicted.
        scores: of each bin.
    """

    edges: tuple[int, ...]
    scores: tuple[Score, ...]

    def __str__(self) -> str:
        rows = zip(pairwise(self.edges), self.scores, strict=True)
        head = f"loss by position, {len(self.scores[0].losses)} documents: nats per token (95 % over documents)"
        lines = (f"{a:>8,} to {b - 1:>8,}  {s.nats:.4f} [{s.low:.4f}, {s.high:.4f}]" for (a, b), s in rows)
        return "\n".join([head, *lines])

    def _figures(self) -> Iterable[bytes]:
        middles = [(a + b) / 2 for a, b in pairwise(self.edges)]
        points = list(zip(middles, (score.nats for score in self.scores), strict=True))
        last = self.edges[-1]
        ticks = {float(n): f"{n:,}" for n in range(0, last + 1, max(1, last // 4))}
        note = "nats per token, by tokens that came before; less is better"
        yield charts.alone(charts.lines("Loss by position", [charts.Curve("", points, "ours")], note, ticks=ticks))


def loss_by_position(
    model: nn.Module,
    documents: Documents,
    *,
    length: int | None = None,
    bins: int = 16,
    batch_tokens: int = 8192,
    resamples: int = 2000,
) -> LossByPosition:
    """Measure the loss of every token of the first ``length`` of each document, in one forward pass for each.

    Other than :func:`.perplexity`, positions hold other tokens: a step between bins may be the text's, a climb at the
    trained window in every document is not.

    Args:
        model: a causal language model, patched or not; run in eval mode, put back as it was.
        documents: token ids, each at least ``length`` long; a mapping gives them names.
        length: tokens of each document; those of the shortest one unless given.
        bins: of about equal width.
        batch_tokens: tokens in a forward pass, at most; one document at least.
        resamples: bootstrap resamples, of documents.

    Raises:
        EvaluationError: a document is too short, there are more bins than tokens, or a loss is not finite.
    """
    texts = read_documents(documents, length or 0)
    length = length or min(len(ids) for ids in texts.values())
    if not 1 <= bins <= length - 1:
        raise EvaluationError(f"bins={bins}: {length} tokens have {length - 1} to predict; wanted 1 to as many bins.")
    edges = [1 + (length - 1) * number // bins for number in range(bins + 1)]
    windows = [Window(None, name, ids[:length], length - 1) for name, ids in texts.items()]
    losses: list[Losses] = [{} for _ in range(bins)]
    found: dict[Hashable, Tensor] = {
        window.document: row
        for window, row in window_losses(model, windows, batch_tokens=batch_tokens, progress="loss by position")
    }
    for name in texts:
        for bucket, (start, end) in zip(losses, pairwise(edges), strict=True):
            bucket[name] = (float(found[name][start - 1 : end - 1].sum()), end - start)
    return LossByPosition(tuple(edges), tuple(summarise(bucket, resamples=resamples) for bucket in losses))
