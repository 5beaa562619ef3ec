"""The settings of a comparison: which parts, and how much of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EvaluationError

PARTS = ("loss", "fidelity", "layers", "retrieval", "decoding")


@dataclass(frozen=True)
class Settings:
    """The amounts of a comparison; the defaults take minutes on two cores with a model of 135 million parameters.

    Attributes:
        parts: names of :data:`PARTS`.
        lengths: of context, in tokens, for loss; in ascending order.
        documents: windows of text, of the longest length.
        targets: predicted tokens of each.
        fidelity_tokens: tokens of text, at most 512 in a row, on which distributions are compared.
        continuation: tokens decoded greedily after each of these rows.
        layer_tokens: tokens of text, at most 512 in a sequence, for the damage by layer.
        retrieval_task: see :func:`hf_attnpatch.evaluation.retrieval`.
        retrieval_lengths: of its prompts, in tokens.
        retrieval_samples: prompts for each length and depth.
        contexts: in tokens, at which decoding is timed.
    """

    parts: tuple[str, ...]
    lengths: tuple[int, ...]
    documents: int = 4
    targets: int = 128
    fidelity_tokens: int = 2048
    continuation: int = 32
    layer_tokens: int = 1024
    retrieval_task: str = "passkey"
    retrieval_lengths: tuple[int, ...] = (256, 512, 1024)
    retrieval_samples: int = 2
    contexts: tuple[int, ...] = (512, 2048)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts:
            raise EvaluationError(f"parts: no {', '.join(unknown) or 'part given'}; choose from {', '.join(PARTS)}.")
        if not self.lengths or min(self.lengths) < 2:
            raise EvaluationError(f"lengths: {self.lengths}; wanted numbers of tokens from 2 up.")
        for name in ("documents", "targets", "fidelity_tokens", "layer_tokens", "retrieval_samples"):
            if getattr(self, name) < 1:
                raise EvaluationError(f"{name}: {getattr(self, name)}; wanted 1 or more.")
        if self.targets >= min(self.lengths):
            raise EvaluationError(
                f"targets: {self.targets} tokens do not leave any context in the shortest length, {min(self.lengths)}; "
                "lower targets."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)


def choose(
    parts: Sequence[str] | None,
    declared: Sequence[int | None],
    *,
    lengths: Sequence[int] | None = None,
    **amounts: Any,
) -> Settings:
    """Return the settings with open choices filled in to fit both models.

    Args:
        parts: to measure; all by default.
        declared: context of each model, in tokens; None where its config says nothing.
        lengths: of context; by default powers of two up to the shorter declared context, at most 2,048, from an eighth
            of it.
        amounts: fields of :class:`Settings`; None leaves the default.

    Raises:
        EvaluationError: a value that cannot be right.
    """
    longest = min([2048, *(c for c in declared if c)])
    if lengths is None:
        lengths = [n for n in (2**power for power in range(4, 12)) if max(longest // 8, 16) <= n <= longest] or [
            longest
        ]
    given = {key: value for key, value in amounts.items() if value is not None}
    unknown = sorted(set(given) - {field.name for field in dataclasses.fields(Settings)})
    if unknown:
        known = ", ".join(field.name for field in dataclasses.fields(Settings))
        raise EvaluationError(f"compare: there is no setting {', '.join(unknown)}; choose from {known}.")
    for name in ("retrieval_lengths", "contexts"):
        fitting = tuple(n for n in getattr(Settings, name) if n <= longest)
        given[name] = tuple(sorted(set(given.get(name) or fitting or (longest,))))
    chosen = tuple(sorted({int(n) for n in lengths}))
    given.setdefault("targets", max(1, min(Settings.targets, min(chosen, default=2) // 2)))
    return Settings(tuple(dict.fromkeys(PARTS if parts is None else parts)), chosen, **given)
