"""Packs the pretrained model into `hf_attnpatch/embedded`, measures it there and writes its card.

    python recipes/evaluate_embedded.py --pack outputs/pretrain     # after recipes/pretrain.py
    python recipes/evaluate_embedded.py                             # measures again what is in the package

What is measured is what ships: the weights rounded to bfloat16, on the held-out text of the package.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_attnpatch import embedded
from recipes import model_card, plots, settings
from recipes.data import DataConfig, load_blocks
from recipes.loop import next_token_loss

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "recipes/results/pretrain"
PROMPTS = {"python": "class Stack:\n    def push(self, item):\n", "prose": "KING HENRY.\nMy lord, "}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured on one domain."""

    domain: str
    documents: int
    tokens: int
    bytes: int
    loss: float  # nats a token
    unigram: float  # nats a token, the same tokens
    bits_per_byte: float
    unigram_bits_per_byte: float


def windows(ids: Sequence[int], eos: int, length: int) -> Iterator[torch.Tensor]:
    """Cuts a document so that every token is predicted once: windows of `length` share their border token.

    Args:
        ids: the document's tokens.
        eos: put in front, as in training, so that the first token is predicted too.
        length: tokens per window.

    Yields:
        int64 tensors of shape (at most length,).
    """
    whole = torch.tensor([eos, *ids])
    for start in range(0, len(ids), length - 1):
        yield whole[start : start + length]


@torch.no_grad()
def model_loss(model: nn.Module, documents: Sequence[Sequence[int]], eos: int, length: int, batch: int = 16) -> float:
    """Sum of the next-token losses over all tokens of the documents, in nats."""
    pieces = sorted((piece for ids in documents for piece in windows(ids, eos, length)), key=len)
    total = 0.0
    for start in range(0, len(pieces), batch):
        part = pieces[start : start + batch]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=eos)  # batch, length
        labels = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100)
        total += float(next_token_loss(model, {"input_ids": ids, "labels": labels})[0])
    return total


def unigram_loss(counts: np.ndarray[Any, Any], documents: Sequence[Sequence[int]]) -> float:
    """The same sum under the training text's token frequencies with one added to every count."""
    logs = np.log(counts + 1) - math.log(counts.sum() + len(counts))
    return float(-sum(logs[np.asarray(ids)].sum() for ids in documents))


def unigram_counts() -> np.ndarray[Any, Any]:
    """How often each token is in the training text, shape (vocabulary,)."""
    return np.array(json.loads((embedded.path() / "unigram_counts.json").read_text()))


def measure(domain: str) -> Figures:
    """Measures the embedded model on one domain of its held-out text."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    texts = embedded.heldout(domain)
    documents = tokenizer(texts, verbose=False)["input_ids"]
    tokens, size = sum(map(len, documents)), sum(len(text.encode()) for text in texts)
    loss = model_loss(model, documents, tokenizer.eos_token_id, model.config.max_position_embeddings)
    unigram = unigram_loss(unigram_counts(), documents)
    return _figures(domain, len(texts), tokens, size, loss, unigram)


def together(parts: Sequence[Figures]) -> Figures:
    """Return the figures over all domains: sums of losses over sums of tokens and bytes."""
    tokens, size, documents = (sum(getattr(p, n) for p in parts) for n in ("tokens", "bytes", "documents"))
    loss, unigram = (sum(getattr(part, name) * part.tokens for part in parts) for name in ("loss", "unigram"))
    return _figures("all", documents, tokens, size, loss, unigram)


def _figures(domain: str, documents: int, tokens: int, size: int, loss: float, unigram: float) -> Figures:
    """Return figures from losses in nats, summed over tokens."""
    return Figures(
        domain=domain,
        documents=documents,
        tokens=tokens,
        bytes=size,
        loss=loss / tokens,
        unigram=unigram / tokens,
        bits_per_byte=loss / size / math.log(2),
        unigram_bits_per_byte=unigram / size / math.log(2),
    )


def sample(prompt: str, tokens: int = 80) -> str:
    """A continuation drawn with seed 0, temperature 0.7, nucleus 0.9."""
    model, tokenizer = embedded.load_model(), embedded.load_tokenizer()
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.9, top_k=0)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def pack(output: Path, values: dict[str, Any]) -> None:
    """Copies a finished run into the package: weights in bfloat16, tokenizer, held-out text, counts, log."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = embedded.path()
    (folder / "overlap.json").unlink(missing_ok=True)  # of the weights that were there before
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    LlamaForCausalLM.from_pretrained(output / "model", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    blocks = load_blocks(settings.build(DataConfig, values["data"], "data"), tokenizer)
    counts = np.bincount(np.asarray(blocks.tokens).reshape(-1), minlength=len(tokenizer))
    (folder / "unigram_counts.json").write_text(json.dumps(counts.tolist()) + "\n")
    shutil.copy(output / "log.jsonl", folder / "training_log.jsonl")
    shutil.copy(ROOT / "data/corpus/manifest.json", folder / "corpus_manifest.json")
    shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", folder / "LICENSE-PSF.txt")
    lines = [line for file in sorted(Path(values["heldout"]).glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    with lzma.open(folder / "heldout.jsonl.xz", "wt", preset=9, encoding="utf-8") as archive:
        archive.writelines(lines)


def main() -> None:
    """Packs if asked to, then measures every domain and writes metrics, figure and card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, metavar="RUN", help="output folder of recipes/pretrain.py")
    parser.add_argument("--config", default=str(ROOT / "recipes/configs/pretrain_embedded.yaml"))
    arguments = parser.parse_args()
    values = settings.read(arguments.config)
    if arguments.pack:
        pack(arguments.pack, values)
    parts = [measure(domain) for domain in embedded.DOMAINS]
    figures = [*parts, together(parts)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "metrics.json").write_text(json.dumps([asdict(row) for row in figures], indent=1) + "\n")
    log = [json.loads(line) for line in (embedded.path() / "training_log.jsonl").read_text().splitlines()]
    levels = {"unigram, held out": figures[-1].unigram, "shipped weights, all held-out text": figures[-1].loss}
    plots.loss_curve(log, RESULTS / "loss.png", title="Pretraining of the embedded model", levels=levels)
    manifest = json.loads((embedded.path() / "corpus_manifest.json").read_text())
    samples = {domain: sample(prompt) for domain, prompt in PROMPTS.items()}
    parameters = sum(parameter.numel() for parameter in embedded.load_model().parameters())
    facts = {"parameters": parameters, "tokens": int(unigram_counts().sum())}
    seen = embedded.path() / "overlap.json"  # not there once other weights were packed
    overlap = json.loads(seen.read_text()) if seen.is_file() else []
    card = model_card.render(figures, log, manifest, samples, facts, values, overlap)
    (embedded.path() / "README.md").write_text(card, "utf-8")
    print(model_card.table(figures))


if __name__ == "__main__":
    main()
