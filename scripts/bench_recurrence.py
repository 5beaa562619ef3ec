"""What evaluation by recurrence costs, and what it says, against recomputing a sliding window and plain segments.

    python scripts/bench_recurrence.py --out recipes/results/recurrence/bench.json
    python scripts/bench_recurrence.py --stream 200000   # peak memory of one long text

The three take turns in this process, on the same text of the embedded model's own, at equal context: windows of 1024
tokens at stride 16; segments of 1024 without memory; segments of 512 with 512 before each. CPU time counts, per
predicted token, and the ratios are of medians over rounds. All three losses are of the same tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_attnpatch as ap
from hf_attnpatch import embedded
from hf_attnpatch.evaluation.logits import token_losses
from hf_attnpatch.evaluation.memory import resident
from hf_attnpatch.evaluation.recurrence import document_tokens
from hf_attnpatch.evaluation.timing import ratio


def text(tokens: int) -> Tensor:
    """Held-out prose one after another, as many tokens as asked for, again from the beginning where it ends."""
    tokenizer = embedded.load_tokenizer()
    ids = [i for document in embedded.heldout("prose") for i in tokenizer(document, verbose=False)["input_ids"]]
    return torch.tensor(ids).repeat(tokens // len(ids) + 1)[:tokens]


@torch.no_grad()
def sliding(model: nn.Module, ids: Tensor, window: int, stride: int, start: int, stop: int) -> Tensor:
    """Losses of tokens start to stop - 1, each window computed anew for its last ``stride`` tokens."""
    parts = []
    for end in range(start + stride, stop + 1, stride):
        row = ids[end - window : end][None]
        parts.append(token_losses(model, row, row[:, -stride:])[0])
    return torch.cat(parts)


@torch.no_grad()
def plain(model: nn.Module, ids: Tensor, length: int) -> Tensor:
    """Losses of every token but the first of each segment, segments alone."""
    return torch.stack([token_losses(model, row[None], row[None, 1:])[0] for row in ids.split(length)])


def recurrent(model: nn.Module, ids: Tensor, columns: int) -> Tensor:
    """Losses of every token but the first."""
    parts = document_tokens(model, ap.stream(model), [ids], rows=1, columns=columns)
    return torch.cat([losses for _, _, losses in parts])


def timed(work: Any) -> tuple[float, Tensor]:
    """CPU seconds of all threads, and what came out."""
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def compare(window: int, stride: int, rounds: int, windows: int, segments: int) -> dict[str, Any]:
    """Run the three in turns."""
    base, model = embedded.load_model(), embedded.load_model()
    half = window // 2
    ap.patch_segment_recurrence(model, segment_length=half, memory_length=half)
    size = segments * window
    ids = text(rounds * size)
    seconds: dict[str, list[float]] = {"sliding": [], "plain": [], "recurrent": []}
    losses: dict[str, list[Tensor]] = {name: [] for name in seconds}
    for number in range(rounds):
        part = ids[number * size : (number + 1) * size]
        first = window + stride  # as many windows as asked for, behind the first one
        stop = first + windows * stride
        runs = {
            "sliding": lambda p=part, a=first, b=stop: sliding(base, p, window, stride, a, b),
            "plain": lambda p=part: plain(base, p, window),
            "recurrent": lambda p=part: recurrent(model, p, window),
        }
        for name, work in runs.items():
            took, found = timed(work)
            count = windows * stride if name == "sliding" else size
            seconds[name].append(took / count)
            if name == "plain":  # the first token of a segment has no context, and no loss
                found = torch.cat([torch.full((len(found), 1), torch.nan), found], 1).flatten()[1:]
            losses[name].append((found if name == "sliding" else found[first - 1 : stop - 1]).double())
    kept = ~torch.cat(losses["plain"]).isnan()
    speed, plainly = ratio(seconds["sliding"], seconds["recurrent"]), ratio(seconds["recurrent"], seconds["plain"])
    return {
        "window": window,
        "stride": stride,
        "segment": half,
        "memory": half,
        "rounds": rounds,
        "tokens_of_loss": int(kept.sum()),
        "microseconds_per_token": {name: sorted(1e6 * s for s in t)[len(t) // 2] for name, t in seconds.items()},
        "loss": {name: float(torch.cat(part)[kept].mean()) for name, part in losses.items()},
        "sliding_over_recurrent": {"value": speed[0], "interval": speed[1]},
        "recurrent_over_plain": {"value": plainly[0], "interval": plainly[1]},
    }


def streamed(tokens: int, every: int = 20_000, columns: int = 1024) -> dict[str, Any]:
    """Resident memory while one text is read, after each so many tokens."""
    model = embedded.load_model()
    ap.patch_segment_recurrence(model, segment_length=256, memory_length=256)
    ids, found = text(tokens), []
    with torch.no_grad(), ap.stream(model) as stream:
        for start in range(0, tokens, columns):
            model(input_ids=ids[None, start : start + columns], use_cache=False, logits_to_keep=1)
            if (start + columns) // every > start // every:
                held = sum(t.numel() * t.element_size() for t in stream.state_dict().values())
                found.append({"tokens": start + columns, "resident_bytes": resident(), "memory_bytes": held})
    return {"tokens": tokens, "segment": 256, "memory": 256, "seen": found}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, nargs="*", default=[1024, 512])
    parser.add_argument("--stride", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help="sliding windows in a round")
    parser.add_argument("--segments", type=int, default=8, help="segments of the window's length in a round")
    parser.add_argument("--stream", type=int, default=0, help="tokens of one long text")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = (arguments.stride, arguments.rounds, arguments.windows, arguments.segments)
    result: dict[str, Any] = {"comparisons": [compare(window, *sizes) for window in arguments.window]}
    if arguments.stream:
        result["stream"] = streamed(arguments.stream)
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
