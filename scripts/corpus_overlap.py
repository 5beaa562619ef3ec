"""Measures how much of the embedded model's held-out text is also in its pretraining text, in runs of 13 tokens.

    python scripts/build_corpus.py && python scripts/corpus_overlap.py

The split holds out whole documents, but documents quote each other: licences, headers, imports, verses. A run counts as
seen if the same 13 tokens stand together anywhere in the training text. Writes `overlap.json` beside the model and the
section of its card that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme

from hf_attnpatch import embedded
from recipes import model_card

LENGTH = model_card.RUN


def runs(ids: Sequence[int]) -> Iterator[bytes]:
    """The runs of a document, each as its tokens' bytes."""
    tokens = np.asarray(ids, dtype=np.uint16).tobytes()
    return (tokens[start : start + 2 * LENGTH] for start in range(0, len(tokens) - 2 * (LENGTH - 1), 2))


def training_texts(folder: Path) -> Iterator[str]:
    """The documents that the model was trained on."""
    for file in sorted(folder.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def check(manifest: Path) -> None:
    """Ends the program if this is not the corpus that the model was trained on."""
    if not manifest.is_file():
        raise SystemExit(f"{manifest} is not there; run scripts/build_corpus.py first.")
    wanted = json.loads((embedded.path() / "corpus_manifest.json").read_text())
    if json.loads(manifest.read_text())["train"] != wanted["train"]:
        raise SystemExit(f"{manifest}: another corpus than the embedded model was trained on (another Python?).")


@torch.no_grad()
def losses(model: torch.nn.Module, ids: Sequence[int], eos: int, length: int) -> np.ndarray:
    """The loss of every token of a document in nats, in windows that share their border token, shape (tokens,)."""
    whole, found = torch.tensor([eos, *ids]), []
    for start in range(0, len(ids), length - 1):
        piece = whole[start : start + length]
        logits = model(input_ids=piece[None, :-1]).logits[0].float()
        found.append(F.cross_entropy(logits, piece[1:], reduction="none"))
    return torch.cat(found).numpy()


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("data/corpus"), help="what scripts/build_corpus.py wrote")
    arguments = parser.parse_args()
    check(arguments.corpus / "manifest.json")
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    heldout = {d: tokenizer(embedded.heldout(d), verbose=False)["input_ids"] for d in embedded.DOMAINS}
    wanted = {run for documents in heldout.values() for ids in documents for run in runs(ids)}
    seen: set[bytes] = set()
    for text in training_texts(arguments.corpus / "train"):
        seen.update(wanted.intersection(runs(tokenizer(text, verbose=False)["input_ids"])))
    marks, nats = {}, {}
    for domain, documents in heldout.items():
        marks[domain] = np.concatenate([[run in seen for run in runs(ids)] for ids in documents])
        length = model.config.max_position_embeddings
        each = (losses(model, ids, tokenizer.eos_token_id, length)[LENGTH - 1 :] for ids in documents)
        nats[domain] = np.concatenate(list(each))
    marks["all"], nats["all"] = (np.concatenate(list(part.values())) for part in (marks, nats))
    rows = [
        {
            "name": name,
            "runs": len(marked),
            "seen": float(marked.mean()),
            "loss": float(nats[name].mean()),
            "unseen_loss": float(nats[name][~marked].mean()),
        }
        for name, marked in marks.items()
    ]
    (embedded.path() / "overlap.json").write_text(json.dumps(rows, indent=1) + "\n")
    card = embedded.path() / "README.md"
    card.write_text(readme.with_part(card.read_text("utf-8"), "overlap", model_card.overlap(rows)), "utf-8")
    print(model_card.overlap(rows))


if __name__ == "__main__":
    main()
