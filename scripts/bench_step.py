"""Decode steps of two versions of this code, interleaved: what a change made faster or slower.

    git worktree add ../before HEAD~10
    python scripts/bench_step.py ../before .            # prints a table; CPU milliseconds of a step, medians

Each figure is one step of a Llama of two layers (width 512, eight heads) with 32,768 tokens in its cache, which are
random; the patches are those whose steps had loops or copies over keys. The states run in processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PATCHES = ("plain", "alibi", "self_extend", "re_rope")
LENGTH, BATCHES, STEPS = 32_768, (1, 8), 8


def worker() -> None:
    """Print the CPU milliseconds of each patch and batch, as JSON."""
    import time

    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    import hf_attnpatch as ap

    torch.set_num_threads(1)
    kinds = {
        "plain": None,
        "alibi": ap.Alibi(backend="sdpa"),
        "self_extend": ap.SelfExtend(window=1024, group=8, trained=8192),
        "re_rope": ap.ReRope(window=1024, trained=8192),
    }
    found = {}
    for name, patch in kinds.items():
        config = LlamaConfig(
            hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, vocab_size=64
        )
        config.max_position_embeddings = 8192
        model = LlamaForCausalLM(config).eval()
        if patch is not None:
            ap.apply(model, patch)
        for batch in BATCHES:
            cache = DynamicCache(config=config)
            for layer in range(2):
                cache.update(*(torch.randn(batch, 8, LENGTH - 1, 64) for _ in range(2)), layer)
            times = []
            with torch.no_grad():
                for _ in range(STEPS):
                    begin = time.process_time()
                    model(torch.ones(batch, 1, dtype=torch.long), use_cache=True, **{_cache_name(): cache})
                    times.append(time.process_time() - begin)
            found[f"{name}, batch {batch}"] = 1e3 * statistics.median(times[2:])
            del cache
    print(json.dumps(found))


def _cache_name() -> str:
    import inspect

    from transformers import LlamaForCausalLM

    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return next(name for name in ("cache", "past_key_values") if name in names)


def main() -> None:
    """Run the trees in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rounds: dict[Path, list[dict[str, float]]] = {given.before: [], given.after: []}
    for _ in range(given.rounds):
        for tree in rounds:
            command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker"]
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": str(tree.resolve())},
                capture_output=True,
                text=True,
                check=True,
            )
            rounds[tree].append(json.loads(done.stdout.splitlines()[-1]))
    print("| step | before, ms | after, ms | after / before | after / plain |\n| --- | ---: | ---: | ---: | ---: |")
    middle = {tree: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for tree, runs in rounds.items()}
    for key, before in middle[given.before].items():
        after = middle[given.after][key]
        plain = middle[given.after][f"plain, {key.split(', ')[1]}"]
        print(f"| {key} | {before:.1f} | {after:.1f} | {after / before:.2f} | {after / plain:.2f} |")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
