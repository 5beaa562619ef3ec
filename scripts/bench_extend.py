"""Attention at changed distances against plain causal attention: prefill, decoding, memory.

    python scripts/bench_extend.py            # some ten minutes on an idle core
    python scripts/bench_extend.py --quick --out /tmp/extend

All rivals of a row run in turns in one process. Ratios are of CPU time, medians over rounds, so that neighbours on the
machine count little; those of the best wall times stand in brackets. Distances are the defaults of the patches for a
model trained at a quarter of the length, so that three quarters of the queries are beyond it. Peak memory is that of a
process of its own for each length.

Writes `bench_extend.json` and `README.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_alibi import grows, race
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.evaluation.hardware import processor
from hf_attnpatch.functional import rotary, spanned
from hf_attnpatch.functional.rerotation import RotaryPlanes
from hf_attnpatch.functional.spans import Remapping
from hf_attnpatch.spans.attention import RemapPositions, span_of
from hf_attnpatch.upstream import words
from hf_attnpatch.upstream.roles import run

HEADS, WIDTH = 8, 64
OUT = Path(__file__).parents[1] / "recipes" / "results" / "extend_speed"
METHODS = ("self_extend", "dual_chunk", "re_rope", "jet_long", "attention_sinks")
Row = dict[str, Any]


def build(trained: int, layers: int = 1) -> LlamaForCausalLM:
    """A random Llama of 8 heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=HEADS * WIDTH, intermediate_size=4 * HEADS * WIDTH, num_hidden_layers=layers
    )
    config.num_attention_heads = config.num_key_value_heads = HEADS
    config.max_position_embeddings = trained
    return LlamaForCausalLM(config).eval()


def patched(method: str, trained: int) -> LlamaForCausalLM:
    """The same with a patch at its defaults."""
    model = build(trained)
    ap.apply(model, ap.from_spec({"patch": method}))
    return model


def default_span(method: str, trained: int) -> Remapping:
    """The distances that a patch gives such a model."""
    found = span_of(patched(method, trained).model.layers[0].self_attn)
    assert isinstance(found, RemapPositions)
    return found.span


def states(length: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values of fp32."""
    return torch.randn(1, HEADS, queries, WIDTH), *(torch.randn(1, HEADS, length, WIDTH) for _ in range(2))


@torch.inference_mode()
def attention(length: int, queries: int, rounds: int) -> Row:
    """Attention alone: a prefill where there are as many queries as keys, a step of decoding where there is one."""
    query, key, value = states(length, queries)
    places, scale = torch.arange(length)[None], WIDTH**-0.5
    turning = RotaryPlanes(rotary.default(10000.0, WIDTH))

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1)

    def merged(span: Remapping) -> Callable[[], Tensor]:
        return lambda: spanned.attend(query, key, value, places, span, turning, scale)

    rivals = {"plain": plain} | {name: merged(default_span(name, length // 4)) for name in METHODS}
    return {"length": length, "queries": queries, "seconds": race(rivals, rounds)}


@torch.inference_mode()
def decoding(length: int, rounds: int, steps: int = 8) -> Row:
    """A whole model of one layer writes some tokens after a prompt, the cache of which is filled once."""
    ids = torch.randint(0, 512, (1, length))
    rivals: dict[str, Callable[[], object]] = {}
    for name in ("plain", *METHODS):
        model = build(length // 4) if name == "plain" else patched(name, length // 4)
        cache = DynamicCache(config=model.config)
        run(model, {words.TOKENS: ids, words.CACHE: cache}, logits_to_keep=1)
        rivals[name] = _step(model, cache, steps)
    return {"length": length, "steps": steps, "seconds": race(rivals, rounds)}


def _step(model: LlamaForCausalLM, cache: DynamicCache, steps: int) -> Callable[[], object]:
    token = torch.ones(1, 1, dtype=torch.long)

    def go() -> None:
        for _ in range(steps):  # the cache grows by these few tokens in each round
            run(model, {words.TOKENS: token, words.CACHE: cache})

    return go


@torch.inference_mode()
def peak(name: str, length: int) -> float:
    """MiB by which this process's peak grows in attention over so many tokens."""
    torch.set_num_threads(2)
    tensors, turning = states(length, length), RotaryPlanes(rotary.default(10000.0, WIDTH))
    if name == "plain":
        return grows(lambda: F.scaled_dot_product_attention(*tensors, is_causal=True))
    span, places = default_span(name, length // 4), torch.arange(length)[None]
    return grows(lambda: spanned.attend(*tensors, places, span, turning, WIDTH**-0.5))


def measured_peak(name: str, length: int) -> Row:
    """The same in a process of its own."""
    run = [sys.executable, "-W", "ignore", __file__, "--peak", name, str(length)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return {"what": name, "length": length, "MiB": float(out.split()[-1])}


def ratio(row: Row, name: str) -> str:
    """CPU time over that of plain attention, wall time in brackets."""
    mine, plain = row["seconds"][name], row["seconds"]["plain"]
    return f"{mine['cpu'] / plain['cpu']:.2f} ({mine['wall'] / plain['wall']:.2f})"


def table(rows: list[Row], what: str) -> list[str]:
    """Methods by lengths."""
    head = ["method", *(f"{row['length']} tokens" for row in rows)]
    lines = ["", what, "", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * len(rows)}"]
    return lines + [f"| {name} | {' | '.join(ratio(row, name) for row in rows)} |" for name in METHODS]


def markdown(found: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Training-free context extension: time and memory",
        "",
        f"`make bench-extend` on {found['machine']}, {found['threads']} threads, torch {torch.__version__}. Times over "
        f"those of plain causal attention: CPU time, wall time in brackets, medians of {found['rounds']} rounds in "
        f"turns. {HEADS} heads of {WIDTH}, fp32; trained at a quarter of each length, patches at their defaults.",
        "On a machine that others use, wall times say little.",
        *table(found["prefill"], "Attention of a whole prompt."),
        *table(found["step"], "Attention of one new token to a cache: far keys are turned anew for each."),
        *table(found["decoding"], "A model of one layer (width 512) writes tokens after a prompt."),
        "",
        "Sinks leave most of the cache out; what the others pay in a prompt is for triangles, of which a kernel",
        "computes the whole square, and in a step for turning keys. Peak memory of attention beyond its inputs, MiB:",
        "",
    ]
    lengths = sorted({row["length"] for row in found["memory"]})
    lines += [f"| method | {' | '.join(f'{n} tokens' for n in lengths)} |", f"| --- |{' ---: |' * len(lengths)}"]
    for name in ("plain", *METHODS):
        cells = [f"{row['MiB']:.0f}" for row in found["memory"] if row["what"] == name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.peak[0], int(given.peak[1])))
        return
    lengths = (256, 512) if given.quick else (4096, 8192)
    found: dict[str, Any] = {
        "machine": processor(torch.device("cpu")),
        "threads": given.threads,
        "rounds": given.rounds,
        "prefill": [attention(n, n, given.rounds) for n in lengths],
        "step": [attention(n, 1, 10 * given.rounds) for n in lengths],
        "decoding": [decoding(n, given.rounds) for n in lengths],
        "memory": [measured_peak(name, n) for name in ("plain", *METHODS) for n in lengths],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bench_extend.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "README.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
