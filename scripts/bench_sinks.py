"""Learned sinks through torch's flash kernel against transformers' eager attention: time, memory, logits, gradients.

    python scripts/bench_sinks.py            # some minutes on two idle cores, 9 GB for the stock models at 8,192 tokens
    python scripts/bench_sinks.py --lengths 8192 --rounds 1
    python scripts/bench_sinks.py --quick --out /tmp/sinks

One model of each type reads a prompt stock and after `Flash`, in turns in one process. Ratios are of CPU time, medians
over rounds; the best wall times stand beside them in brackets. Peak memory is that of a process of its own for each
length. Logits and gradients are compared on a text with windows shorter than it, and both with the stock model in fp64.

Writes `bench_sinks.json` and `README.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_alibi import Row, grows, race

import hf_attnpatch as ap
from hf_attnpatch.evaluation.hardware import processor

OUT = Path(__file__).parents[1] / "recipes" / "results" / "sinks"
TYPES = ("granite_swa", "gpt_oss")
WINDOW = 128
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 512, 8, 2, 64


def build(family: str, length: int, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A random model of two layers, one of which sees a window of 128 tokens."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": len(kinds)}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1} if family == "gpt_oss" else {}
    config = transformers.AutoConfig.for_model(
        family,
        **{**sizes, **heads, **experts},
        sliding_window=WINDOW,
        layer_types=kinds,
        max_position_embeddings=max(length, 2 * WINDOW),
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(1.0)
    return model


@torch.inference_mode()
def prefill(family: str, length: int, rounds: int) -> Row:
    """A prompt, stock and fused."""
    stock, fused = build(family, length), build(family, length)
    ap.patch_flash(fused)
    ids = torch.randint(1, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    apart = _apart(stock(ids, use_cache=False).logits, fused(ids, use_cache=False).logits)
    rivals = {name: lambda m=m: m(ids, use_cache=False) for name, m in (("stock", stock), ("fused", fused))}
    return {"family": family, "length": length, "seconds": race(rivals, rounds), "logits": apart}


def exactness(family: str, length: int) -> Row:
    """Logits, and the largest gradient error of any parameter and of the sinks, each over the largest there is."""
    found: Row = {"family": family, "length": length}
    answers: dict[str, Any] = {}
    ids = torch.randint(1, 1024, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : length // 5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    exact = build(family, length).double()
    for name in ("exact", "stock", "fused"):
        model = exact if name == "exact" else build(family, length)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # others take no fp64
        if name == "fused":
            ap.patch_flash(model, training=True)
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        answers[name] = out.logits.detach()[mask.bool()], gradients
    for name in ("stock", "fused"):
        logits, gradients = answers[name]
        found[name] = {
            "logits": _apart(answers["exact"][0], logits),
            "gradients": max(_apart(wanted, gradients[n]) for n, wanted in answers["exact"][1].items()),
            "sinks": max(_apart(w, gradients[n]) for n, w in answers["exact"][1].items() if n.endswith("sinks")),
        }
    return found


def _apart(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted.double() - found.double()).abs().max() / wanted.abs().max())


@torch.inference_mode()
def peak(what: str, length: int) -> float:
    """MiB by which this process's peak grows; what is a family, or a family with ``-stock``."""
    torch.set_num_threads(2)
    model = build(what.removesuffix("-stock"), length)
    if not what.endswith("-stock"):
        ap.patch_flash(model)
    model(torch.ones(1, 2 * WINDOW, dtype=torch.long), use_cache=False, logits_to_keep=1)
    return grows(lambda: model(torch.ones(1, length, dtype=torch.long), use_cache=False, logits_to_keep=1))


def measured(what: str, length: int) -> Row:
    """Peak memory, in a process of its own."""
    command = [sys.executable, __file__, "--peak", what, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"what": what, "length": length, "MiB": float(done.stdout.strip().splitlines()[-1])}


def page(found: Row) -> str:
    """The README."""
    rows = found["prefill"]
    best = {row["family"]: row for row in rows}  # the longest of each comes last
    said = ", ".join(f"{f} {_ratio(r, 'cpu'):.2f} ({_ratio(r, 'wall'):.2f})" for f, r in best.items())
    lines = [
        "# Learned sinks through torch's flash kernel",
        "",
        f"**A prompt of {rows[-1]['length']:,} tokens is read so many times as fast as by transformers' eager "
        f"attention, in CPU time (wall time): {said}.**",
        "",
        f"`make bench-sinks` on {found['machine']}, {found['threads']} threads, torch {found['torch']}, transformers "
        f"{found['transformers']}. Models of two layers, one with a window of {WINDOW} tokens, width {WIDTH}, {HEADS} "
        f"heads of {HEAD_DIM} over {KV_HEADS}, fp32. Medians of {found['rounds']} rounds in turns.",
        "",
        "| model | tokens | stock, s | fused, s | speed-up | logits apart |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {r['family']} | {r['length']} | {r['seconds']['stock']['cpu']:.2f} | "
            f"{r['seconds']['fused']['cpu']:.2f} | {_ratio(r, 'cpu'):.2f} ({_ratio(r, 'wall'):.2f}) | "
            f"{r['logits']:.1e} |"
            for r in rows
        ),
        "",
        "From the stock model in fp64, over the largest number there is; two rows of text, one padded on the left.",
        "",
        "| model | tokens | | logits | gradients, the worst parameter | gradients of the sinks |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
        *(
            f"| {r['family']} | {r['length']} | {name} | {r[name]['logits']:.1e} | {r[name]['gradients']:.1e} | "
            f"{r[name]['sinks']:.1e} |"
            for r in found["exactness"]
            for name in ("stock", "fused")
        ),
        "",
        "Peak memory beyond the weights, MiB, logits of the last token only.",
        "",
        "| what | tokens | MiB |",
        "| --- | ---: | ---: |",
        *(f"| {r['what']} | {r['length']} | {r['MiB']:.0f} |" for r in found["peak"]),
        "",
    ]
    return "\n".join(lines)


def _ratio(row: Row, clock: str) -> float:
    return float(row["seconds"]["stock"][clock] / row["seconds"]["fused"][clock])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("WHAT", "TOKENS"))
    given = parser.parse_args()
    if given.peak:
        print(peak(given.peak[0], int(given.peak[1])))
        return
    torch.set_num_threads(2)
    lengths, rounds = ((512, 1024), 1) if given.quick else (given.lengths, given.rounds)
    memory = [(TYPES[0], factor * lengths[-1] // 2) for factor in (1, 2, 4)]  # attention is the same in the others
    memory += [(f"{TYPES[0]}-stock", lengths[-1] // 2)]
    found: Row = {
        "machine": processor(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": rounds,
        "exactness": [exactness(family, 512) for family in TYPES],
        "prefill": [prefill(family, length, rounds) for family in TYPES for length in lengths],
        "peak": [measured(what, length) for what, length in memory],
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "bench_sinks.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "README.md").write_text(page(found))


if __name__ == "__main__":
    main()
