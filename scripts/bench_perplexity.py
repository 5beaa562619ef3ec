"""Does perplexity by length cost more than a bare forward over the same tokens, and how much memory does it take?

    python scripts/bench_perplexity.py data/smollm2 --length 8192 --targets 8191
    python scripts/bench_perplexity.py embedded --length 512 --targets 256 --documents 16

Measures in turns, in this process: `perplexity` and the model's own forward over the same batches. CPU time counts, and
the ratio is that of medians. The peak is the process's resident memory above what it was with the model loaded and run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.evaluation import perplexity
from hf_attnpatch.evaluation.memory import peak_memory
from recipes.sources import load_model


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print; exit with 1 beyond the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a hub name, or `embedded`")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--targets", type=int, default=8191)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    length, targets, budget = arguments.length, arguments.targets, arguments.batch_tokens
    model = load_model(arguments.model, arguments.dtype).eval()
    ids = torch.randint(model.config.vocab_size, (arguments.documents, length))
    rows = max(1, budget // length)

    @torch.no_grad()
    def bare(keep: int) -> None:
        for part in ids.split(rows):
            model(input_ids=part, use_cache=False, logits_to_keep=keep)

    def ours() -> None:  # one window a document: the sliding baseline is the truncated one
        perplexity(model, list(ids), lengths=(length,), targets=targets, stride=targets, batch_tokens=budget)

    with torch.no_grad():
        model(input_ids=ids[:, :16], use_cache=False)
    with peak_memory(torch.device("cpu")) as peak:
        ours()
    if peak.before is None or peak.more is None:
        raise SystemExit("memory is read from /proc/self, which this system has not.")
    said = f"{length} tokens, {targets} targets, {arguments.documents} documents"
    print(f"{said}; with the model: {peak.before / 1e9:.2f} GB")
    print(f"perplexity: {peak.more / 1e9:.2f} GB more at its peak")
    work = {
        "perplexity": ours,
        "bare, logits of the targets": lambda: bare(targets),
        "bare, no logits": lambda: bare(1),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.rounds):
        for name, call in work.items():
            times[name].append(cpu(call))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<28} {seconds:8.3f} s CPU  {seconds / medians['bare, logits of the targets']:.3f}")


if __name__ == "__main__":
    main()
