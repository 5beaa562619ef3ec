"""Windows of documents and their losses, for perplexity by length and loss by position."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from ..progress import track
from .logits import token_losses
from .losses import check_finite
from .mode import device_of, measuring

Documents = Sequence[Sequence[int] | Tensor] | Mapping[str, Sequence[int] | Tensor]


@dataclass(frozen=True)
class Window:
    """A piece of a document and how many of its last tokens are predicted.

    Attributes:
        group: what it counts for.
        document: the name of the document.
        ids: shape (length,), int64.
        targets: less than the length.
    """

    group: Hashable
    document: Hashable
    ids: Tensor
    targets: int


def read_documents(documents: Documents, length: int) -> dict[Hashable, Tensor]:
    """Return the documents by name (by number, where they have none), shape (tokens,), int64.

    Raises:
        EvaluationError: there are none, or one is shorter than ``length``.
    """
    named = documents.items() if isinstance(documents, Mapping) else enumerate(documents)
    found: dict[Hashable, Tensor] = {name: torch.as_tensor(ids, dtype=torch.int64) for name, ids in named}
    if not found:
        raise EvaluationError("there are no documents; give lists of token ids, one for each.")
    for name, ids in found.items():
        if ids.dim() != 1:
            raise EvaluationError(
                f"document {name}: token ids of shape {tuple(ids.shape)}, wanted (tokens,); give one list a document."
            )
        if len(ids) < length:
            raise EvaluationError(
                f"document {name}: {len(ids)} tokens, wanted at least {length}; leave it out, or ask for less context."
            )
    return found


def window_losses(
    model: nn.Module, windows: Sequence[Window], *, batch_tokens: int, progress: str
) -> Iterator[tuple[Window, Tensor]]:
    """Yield each window with the nats of its targets, shape (targets,), float64, on the CPU.

    Windows of one length share a forward pass of at most ``batch_tokens`` tokens (one window at least).

    Raises:
        EvaluationError: a loss is not finite.
    """
    passes: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        passes.setdefault((len(window.ids), window.targets), []).append(window)
    parts = []
    for (length, _), same in sorted(passes.items(), key=lambda item: (item[0][0], -item[0][1])):
        rows = max(1, batch_tokens // length)
        parts += [same[start : start + rows] for start in range(0, len(same), rows)]
    with measuring(model):
        for part in track(parts, progress):
            ids = torch.stack([window.ids for window in part]).to(device_of(model))  # batch, length
            losses = token_losses(model, ids, ids[:, -part[0].targets :]).double().cpu()
            for window, row in zip(part, losses, strict=True):
                check_finite(row, f"document {window.document}", len(window.ids))
                yield window, row
