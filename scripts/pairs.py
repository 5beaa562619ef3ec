"""Puts every pair of patches on a tiny model, in both orders, and writes a table of what came of it.

The patch of the row is applied first, that of the column in a second call. A number is the largest difference of a
logit, over the largest logit, from an oracle: the other order, or, where both say where tokens stand, the second patch
alone; ok where the oracle itself is refused, and ``tests/test_pairs.py`` has another one. In brackets is the reason why
two patches do not go together; it stands below the table. The self-check of each call holds decoding with a cache to
the whole forward, too.

    python scripts/pairs.py llama gpt2 bloom > recipes/results/pairs/README.md
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_attnpatch as ap

MEMORY = ap.SegmentRecurrence(segment_length=8, memory_length=8)
PATCHES: dict[str, ap.Patch] = {
    "alibi": ap.Alibi(distance_clip=64),
    "relative_xl": ap.RelativeXl(),
    "rotary": ap.Rotary(theta=500.0),
    "rope_scaling": ap.RopeScaling(kind="linear", factor=2.0),
    "no_position": ap.NoPosition(),
    "self_extend": ap.SelfExtend(window=6, group=3, trained=10),
    "attention_sinks": ap.AttentionSinks(num_sinks=2, window=6, trained_length=12),
    "memory": MEMORY,
    "grouped_query": ap.GroupedQuery(num_kv_heads=2, method="mean"),
    "flash": ap.Flash(backend="sdpa"),
}
TEXT = torch.randint(5, 99, (1, 40), generator=torch.Generator().manual_seed(0))
SIZES = {
    "llama": {
        "max_position_embeddings": 8192,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
}


def model_of(kind: str) -> PreTrainedModel:
    """A tiny model with random weights, eager so that a fused kernel is a change."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=128, **SIZES[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def patched(kind: str, *patches: ap.Patch) -> PreTrainedModel:
    """A tiny model with patches, each in a call of its own."""
    model = model_of(kind)
    for patch in patches:
        torch.manual_seed(1)
        ap.apply(model, patch)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a text longer than every window, memory and trained length of the patches above."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TEXT, use_cache=False).logits
    return found


def oracle(first: ap.Patch, second: ap.Patch) -> tuple[ap.Patch, ...]:
    """The patches, in order, that give the same as these two.

    Of two that say where tokens stand, the second alone, unless it scales what the first left; else the other order.
    """
    if not (first.changes_positions and second.changes_positions):
        return second, first
    if isinstance(second, ap.RopeScaling) and isinstance(first, ap.Rotary):
        return (ap.Rotary(theta=first.theta, kind=second.kind, factor=second.factor),)
    if isinstance(second, ap.RopeScaling) and isinstance(first, ap.RopeScaling):
        return (ap.RopeScaling(kind=second.kind, factor=(first.factor or 1) * (second.factor or 1)),)
    return (second,)


def cell(kind: str, first: ap.Patch, second: ap.Patch) -> tuple[str, str]:
    """What comes of two patches: nothing and the difference from the oracle where they work, else why not."""
    try:
        found = logits(patched(kind, first, second))
    except ap.AttnPatchError as error:
        return " ".join(str(error).split()), ""
    try:
        wanted = logits(patched(kind, *oracle(first, second)))
    except ap.AttnPatchError:
        return "", "ok"
    return "", f"{float((found - wanted).abs().max() / wanted.abs().max()):.1g}"


def table(kind: str) -> list[str]:
    """The table of one model: first patch by row, second by column; the reasons below it."""
    head = [f"| first \\ second | {' | '.join(PATCHES)} |", "| --- " * (len(PATCHES) + 1) + "|"]
    lines = [f"## {kind}", "", *head]
    reasons: dict[str, int] = defaultdict(lambda: len(reasons) + 1)
    for name, first in PATCHES.items():
        found = [cell(kind, first, second) for second in PATCHES.values()]
        lines.append(f"| {name} | {' | '.join(f'({reasons[why]})' if why else gap for why, gap in found)} |")
    return [*lines, "", *(f"{number}. {why}" for why, number in reasons.items()), ""]


def main(kinds: list[str]) -> None:
    """Print the tables."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    legend = (__doc__ or "").split("\n\n")[1]
    print(f"# Two patches on one model\n\nWritten by `python scripts/pairs.py {' '.join(kinds)}`.\n\n{legend}\n")
    for kind in kinds:
        print("\n".join(table(kind)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama", "gpt2", "bloom"])
