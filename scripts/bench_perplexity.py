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
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.evaluation import perplexity
from recipes.sources import load_model


def resident() -> float:
    """Resident memory of this process in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e6
    raise OSError("/proc/self/status names no VmRSS; this needs Linux.")


def peak(work: Callable[[], object]) -> float:
    """Run ``work`` and return the most resident memory that was seen meanwhile, in GB."""
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


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
    base = resident()
    print(f"{length} tokens, {targets} targets, {arguments.documents} documents; with the model: {base:.2f} GB")
    extra = peak(ours) - base
    print(f"perplexity: {extra:.2f} GB more at its peak")
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
