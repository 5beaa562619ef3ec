"""Measures how far two checkpoints' logits differ on a text.

    python scripts/compare_logits.py data/smollm2 data/smollm2-mha
    python scripts/compare_logits.py embedded outputs/demo/converted --text README.md

Prints the largest and mean difference of logits, KL(first || second) per token and how often the two agree on the next
token; exits with 1 where --at-most is given and the largest difference exceeds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import PreTrainedModel

from hf_attnpatch.commands.models import Source

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@torch.no_grad()
def compare(first: PreTrainedModel, second: PreTrainedModel, tokens: torch.Tensor) -> dict[str, float]:
    """The figures for one row of tokens, logits taken in fp32."""
    a, b = (model(tokens).logits.float() for model in (first, second))
    if a.shape != b.shape:
        raise SystemExit(
            f"compare_logits: logits of shape {tuple(a.shape)} and {tuple(b.shape)}; are the vocabularies one?"
        )
    kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return {
        "largest difference": float((a - b).abs().max()),
        "mean difference": float((a - b).abs().mean()),
        "KL per token, nats": float(kl.mean()),
        "same next token": float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    }


def encoded(source: Source, file: Path | None, length: int, vocabulary: int) -> torch.Tensor:
    """The text in the first checkpoint's tokens, or evenly spread ids where it has no tokenizer."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return torch.arange(length)[None] * 97 % vocabulary
    text = file.read_text("utf-8") if file else TEXT * 40
    return tokenizer(text, return_tensors="pt").input_ids[:, :length]


def main(arguments: Sequence[str] | None = None) -> None:
    """Loads both, prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--text", type=Path, help="a file; by default a sentence, repeated")
    parser.add_argument("--length", type=int, default=256, help="tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--at-most", type=float, help="exit with 1 if the largest difference is above this")
    given = parser.parse_args(arguments)
    sources = [Source(name=name, dtype=given.dtype) for name in (given.first, given.second)]
    first, second = (source.model() for source in sources)
    tokens = encoded(sources[0], given.text, given.length, first.config.get_text_config().vocab_size)
    found = compare(first, second, tokens)
    print("\n".join(f"{name}: {value:.6g}" for name, value in found.items()))
    print(f"over {tokens.shape[1]} tokens")
    sys.exit(given.at_most is not None and not found["largest difference"] <= given.at_most)


if __name__ == "__main__":
    main()
