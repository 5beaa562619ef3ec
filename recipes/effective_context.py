"""How far back is context of use to a model? Relative effective context length, after 1901.02860, section 4.4.

Models are compared on the same targets. Those that the best model of the group finds hardest under a shorter context
are where a longer one can help; the length counts up to which lengthening still lowers their loss by a share of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import hf_attnpatch as ap
from hf_attnpatch.evaluation.recurrence import document_tokens


def losses_under(model: nn.Module, texts: list[Tensor], contexts: list[int], targets: int) -> dict[int, Tensor]:
    """Losses of the last tokens of each text that is long enough for all, by context in tokens, (all targets,)."""
    longest = max(contexts) + targets + 1
    found = {}
    for context in contexts:
        cut = [text[longest - 1 - context - targets : longest] for text in texts if len(text) >= longest]
        parts: dict[object, list[Tensor]] = {}
        for name, _, losses in document_tokens(model, ap.stream(model), cut):
            parts.setdefault(name, []).append(losses)
        found[context] = torch.cat([torch.cat(parts[name])[-targets:] for name in range(len(cut))])
    return found


def effective_context(
    group: Mapping[str, Mapping[int, Tensor]], share: float = 0.5, threshold: float = 0.01
) -> dict[str, int]:
    """Return the effective context of each model of a group.

    Args:
        group: model -> context in tokens -> losses of the same targets.
        share: of the targets, the hardest for the best model of the group under the shorter context.
        threshold: least gain of a longer context, as a share of the loss under the shorter one.

    Returns:
        Model -> the longest context up to which each lengthening gained that much, in tokens.
    """
    contexts = sorted(next(iter(group.values())))
    found = {}
    for name, losses in group.items():
        reached = contexts[0]
        for short, long in zip(contexts, contexts[1:], strict=False):
            best = torch.stack([other[short] for other in group.values()]).amin(0)
            hardest = best.topk(max(1, round(share * len(best)))).indices
            before, after = float(losses[short][hardest].mean()), float(losses[long][hardest].mean())
            if (before - after) / before < threshold:
                break
            reached = long
        found[name] = reached
    return found
