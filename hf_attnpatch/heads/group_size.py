"""Chooses the number of key-value heads for a given cache, one for the whole model, by predicted damage."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..errors import AttnPatchError
from ..probe import quiet
from ..sites import Site
from .calibration import chunks, moments_size
from .calibration_text import Batch
from .estimate import estimate, find_frames, input_sizes
from .merger import Merger
from .weights import read_weights

INDIFFERENT = 0.01  # additional energy loss that is accepted for a smaller cache


def choose(
    model: PreTrainedModel,
    sites: Sequence[Site],
    target: float | int | None,
    grouping: str | None,
    text: Sequence[Batch] | None,
) -> tuple[int, str]:
    """Return the number of key-value heads, and a sentence with the reason.

    Args:
        model: left unchanged.
        sites: self-attention modules.
        target: share of the present cache, or bytes per token.
        grouping: which heads share, as in :meth:`Merger.groups`.
        text: calibration batches; None predicts damage from the weights.

    Raises:
        AttnPatchError: the target is not a positive number, or too small for one head.
    """
    present = {s.num_kv_heads for s in sites}
    counts = sorted(n for n in range(1, max(present) + 1) if all(kv % n == 0 for kv in present))
    size = next(model.parameters()).element_size()
    cost = {n: sum(n * (s.head_dim + s.v_head_dim) * size for s in sites) for n in counts}
    now = sum(s.num_kv_heads * (s.head_dim + s.v_head_dim) * size for s in sites)
    limit = _limit(target, now)
    fits = [n for n in counts if cost[n] <= limit]
    if not fits:
        raise AttnPatchError(
            f"cache_target={target!r} is {limit:.0f} bytes per token; one key-value head takes {cost[counts[0]]}, the "
            f"model has {now} now; raise the target."
        )
    lost = predict(model, sites, fits, grouping, text)
    best = next(n for n in fits if lost[n] <= lost[fits[-1]] + INDIFFERENT)
    table = ", ".join(f"{n}: {cost[n]} bytes per token, {100 * lost[n]:.1f} %" for n in fits)
    reason = (
        "the most that fit" if best == fits[-1] else f"predicted to lose hardly more than {fits[-1]}, which fit too"
    )
    return best, f"num_kv_heads=auto took {best}, {reason} into {limit:.0f} bytes per token (energy lost at {table})"


def predict(
    model: PreTrainedModel,
    sites: Sequence[Site],
    counts: Sequence[int],
    grouping: str | None,
    text: Sequence[Batch] | None,
) -> dict[int, float]:
    """Return the mean share of key and value energy that is lost, for each number of heads."""
    lost = dict.fromkeys(counts, 0.0)
    with quiet(model):
        frames = find_frames(model, sites)
        sizes = input_sizes(model, sites) if text is None else None
        for part in chunks(sites, moments_size):
            moments = estimate(model, part, text, frames, sizes)
            for site in part:
                merger = Merger(site, frames[site.path], moments.pop(site.path), read_weights(model, site), "principal")
                for n in counts:
                    groups = merger.groups(n, grouping)
                    lost[n] += sum(map(merger.lost, groups)) / (2 * len(groups) * len(sites))
    return lost


def _limit(target: float | int | None, now: int) -> float:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not target > 0:
        raise AttnPatchError(
            f"cache_target is {target!r}; wanted a share of the present cache such as 0.25, or bytes per token."
        )
    return target * now if isinstance(target, float) and target <= 1 else float(target)
