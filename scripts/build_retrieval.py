"""Texts of a retrieval task with their answers, and ordinary text beside them: what a small model learns to find on.

    python scripts/build_retrieval.py --tokens 512 --count 1600 --out data/passkey/512

Each text is a prompt of the task at a depth of its own, the answer, and more haystack up to `--tokens`, the token that
ends a document included, so that blocks of as many tokens begin with a prompt. Seeds begin at 1,000: no prompt of
`attnpatch eval`, which draws from seed 0, is among them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch.evaluation.retrieval import Example, examples
from hf_attnpatch.evaluation.retrieval.haystack import NOISE
from hf_attnpatch.progress import track
from recipes.sources import embedded_texts, load_tokenizer

FIRST_SEED = 1_000
ROOM = 16  # tokens for the answer; what it leaves is filled with haystack


def drawn(tokenizer: Any, task: str, tokens: int, count: int) -> Iterator[Example]:
    """Prompts at depths that are drawn, each from a seed of its own."""
    rng = Random(FIRST_SEED)
    for number in track(range(count), f"{task}, {tokens} tokens"):
        options = {"depths": (rng.random(),), "samples": 1, "seed": FIRST_SEED + number, "new_tokens": ROOM}
        yield examples(tokenizer, task=task, lengths=(tokens,), **options)[0]


def answered(tokenizer: Any, example: Example, tokens: int) -> str | None:
    """The prompt with its answer as a text of `tokens` less one, or None where a tokenizer would cut it otherwise."""
    options = {"add_special_tokens": False, "verbose": False}
    answer = tokenizer(f" {', '.join(example.answers)}.\n" + f"{NOISE}\n" * 4, **options)["input_ids"]
    ids = [*example.ids, *answer][: tokens - 1]
    text = str(tokenizer.decode(ids))
    return text if tokenizer(text, **options)["input_ids"] == ids else None


def write(path: Path, texts: Iterator[str]) -> int:
    """Writes a JSONL file of texts; returns how many."""
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), "utf-8")
    return len(rows)


def main() -> None:
    """Reads the command line and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="whose tokenizer it is")
    parser.add_argument("--task", default="passkey")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--beside", default="embedded/uptrain", help="a part of the text that ships with the package")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    tokenizer = load_tokenizer(chosen.model)
    prompts = drawn(tokenizer, chosen.task, chosen.tokens, chosen.count)
    texts = (answered(tokenizer, each, chosen.tokens) for each in prompts)
    kept = write(chosen.out / "a_retrieval.jsonl", (text for text in texts if text is not None))
    beside = write(chosen.out / "b_text.jsonl", iter(embedded_texts(chosen.beside)))
    print(f"{chosen.out}: {kept} of {chosen.count} prompts, {beside} texts beside them")


if __name__ == "__main__":
    main()
