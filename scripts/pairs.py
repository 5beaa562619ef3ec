"""Puts every pair of patches on a tiny model, in both orders, and writes a table of what came of it.

A cell is made by two calls of ``apply``, whose self-checks hold decoding to the whole forward; ``tests/test_pairs.py``
has oracles for what the two give together.

    python scripts/pairs.py llama bloom > recipes/results/pairs/README.md
"""

from __future__ import annotations

import copy
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
    "attention_sinks": ap.AttentionSinks(num_sinks=2, window=6),
    "memory": MEMORY,
    "grouped_query": ap.GroupedQuery(num_kv_heads=2, method="mean"),
    "flash": ap.Flash(backend="sdpa"),
}
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
}


def model_of(kind: str) -> PreTrainedModel:
    """A tiny model with random weights, eager so that a fused kernel is a change."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=128, **SIZES[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def cell(model: PreTrainedModel, second: ap.Patch) -> str:
    """What comes of the second patch on a model with the first: empty where it works, else why not."""
    try:
        ap.apply(copy.deepcopy(model), second)
    except ap.AttnPatchError as error:
        return " ".join(str(error).split())
    return ""


def table(kind: str) -> list[str]:
    """The table of one model: first patch by row, second by column; the reasons below it."""
    head = [f"| first \\ second | {' | '.join(PATCHES)} |", "| --- " * (len(PATCHES) + 1) + "|"]
    lines = [f"## {kind}", "", *head]
    reasons: dict[str, int] = defaultdict(lambda: len(reasons) + 1)
    for first, patch in PATCHES.items():
        model = model_of(kind)
        why = cell(model, patch)
        if why:
            lines.append(f"| {first} | {' | '.join([str(reasons[why])] * len(PATCHES))} |")
            continue
        ap.apply(model, patch)
        found = [cell(model, second) for second in PATCHES.values()]
        lines.append(f"| {first} | {' | '.join(str(reasons[w]) if w else 'yes' for w in found)} |")
    return [*lines, "", *(f"{number}. {why}" for why, number in reasons.items()), ""]


def main(kinds: list[str]) -> None:
    """Print the tables."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    print("# Two patches on one model\n\nWritten by `python scripts/pairs.py`. Rows are applied first; `yes`: both")
    print("hold, or the second takes the place of the first where both say where tokens stand. Numbers are reasons.\n")
    for kind in kinds:
        print("\n".join(table(kind)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama", "bloom"])
