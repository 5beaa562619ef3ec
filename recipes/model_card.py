"""The embedded model's card, every figure in it taken from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [tiny, hf_attnpatch]
---
<!-- written by recipes/evaluate_embedded.py; run it instead of editing this -->
# The embedded model of hf_attnpatch

A Llama of {parameters:.2f} million parameters for demos and tests: {layers} layers of {hidden}, {heads} attention heads
with as many key-value heads (plain multi-head), head dimension {head_dim}, context {context}, rotary base {theta:.0f},
tied embeddings, byte-level BPE of {vocabulary} tokens. Weights are stored in bfloat16. It continues Python code and
Elizabethan prose plausibly for a line or two and knows nothing; it is for measuring what patches do to a model.

## How well it models held-out text

Whole documents that it was not trained on, none shorter than 16 thousand characters, cut into windows of {context}
tokens so that every token is predicted once; the bfloat16-rounded weights that are in this folder, computed in float32.
The unigram baseline is the training text's token frequencies with one added to every count (`unigram_counts.json`), on
the same tokens.

{table}

`python recipes/evaluate_embedded.py` measures this again from this folder alone.

### What it has seen of that text

<!-- overlap:start -->
{overlap}
<!-- overlap:end -->

## Training

{tokens:.1f} million tokens ({epochs:.2f} passes over the {unique:.1f} million of the corpus) in {steps} steps of
{batch} blocks of {block}, AdamW with peak learning rate {lr:g} and cosine decay, bfloat16 autocast, two processes of
one thread on two CPU cores: {minutes:.0f} minutes of optimizer steps, beside other work. The last logged training loss
is {final:.3f}. The log is `training_log.jsonl`; its curve is `recipes/results/pretrain/loss.png`. The learning rate was
not tuned, and no choice was made by the held-out text.

```
python scripts/build_corpus.py
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 --master_addr 127.0.0.1 --master_port 29617 \\
    recipes/pretrain.py --config recipes/configs/pretrain_embedded.yaml
python recipes/evaluate_embedded.py --pack outputs/pretrain
```

## Data and licences

Built by `scripts/build_corpus.py` with Python {python}; digests are in `corpus_manifest.json`.

{sources}

The held-out text (`heldout.jsonl.xz`) contains sources and documentation of Python, copyright 2001-2023 Python
Software Foundation, all rights reserved, under the licence in `LICENSE-PSF.txt`. The rest of it is in the public domain
(the King James Version is under letters patent in the United Kingdom). The weights are under Apache-2.0.

## Samples

Seed 0, temperature 0.7, nucleus 0.9, the first draw; the prompt is shown with its continuation.
{samples}"""

RUN = 13  # tokens; a run of so many counts as seen if it stands anywhere in the training text
OVERLAP_ROW = "| {name} | {runs:,} | **{seen:.1%}** | {loss:.3f} | {unseen_loss:.3f} |"
OVERLAP = """\
Whole documents are held out, but documents quote each other: licences, headers, imports, idioms. This share of the
held-out runs of {length} tokens stands in the training text, too. Beside it the loss of all tokens that end such a run,
seen or not, and the loss of those that end a run which the model has not seen.

| held out | runs of {length} | also in the training text | loss, nats/token | of unseen runs |
|---|---:|---:|---:|---:|
{rows}

`python scripts/corpus_overlap.py` measures this from the corpus."""


def overlap(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the model has seen of its held-out text, from the rows of `overlap.json`; none says how to measure it."""
    if not rows:
        return "Not measured for these weights: run `python scripts/corpus_overlap.py`."
    return OVERLAP.format(length=RUN, rows="\n".join(OVERLAP_ROW.format(**row) for row in rows))


def table(figures: Sequence[Any]) -> str:
    """Markdown table of `Figures`, one row a domain."""
    lines = [
        "| held out | documents | tokens | loss, nats/token | unigram, nats/token | bits/byte | unigram, bits/byte |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures:
        lines.append(
            f"| {row.domain} | {row.documents} | {row.tokens:,} | **{row.loss:.3f}** | {row.unigram:.3f} "
            f"| **{row.bits_per_byte:.3f}** | {row.unigram_bits_per_byte:.3f} |"
        )
    return "\n".join(lines)


def sources(manifest: Mapping[str, Any]) -> str:
    """Markdown table of the corpus: source, domain, licence, megabytes for training and held out."""
    heldout = {row["source"]: row["bytes"] for row in manifest["heldout"]}
    lines = ["| source | domain | licence | training MB | held-out MB |", "|---|---|---|---:|---:|"]
    for row in manifest["train"]:
        held = heldout.get(row["source"], 0) / 1e6
        lines.append(
            f"| {row['source']} | {row['domain']} | {row['licence']} | {row['bytes'] / 1e6:.2f} | {held:.2f} |"
        )
    return "\n".join(lines)


def render(
    figures: Sequence[Any],
    log: Sequence[Mapping[str, float]],
    manifest: Mapping[str, Any],
    samples: Mapping[str, str],
    facts: Mapping[str, float],
    values: Mapping[str, Any],
    seen: Sequence[Mapping[str, Any]],
) -> str:
    """The whole card.

    Args:
        figures: rows of `evaluate_embedded.Figures`.
        log: records of the training log.
        manifest: of the corpus.
        samples: prompt and continuation by domain.
        facts: number of `parameters` of the model and of `tokens` of the training text.
        values: the configuration that `recipes/pretrain.py` ran with.
        seen: rows of `overlap.json`; empty where it was not measured for these weights.

    Returns:
        Markdown with the Hub's metadata in front.
    """
    model, train, last = values["model"], values["train"], log[-1]
    return CARD.format(
        parameters=facts["parameters"] / 1e6,
        unique=facts["tokens"] / 1e6,
        layers=model["num_hidden_layers"],
        hidden=model["hidden_size"],
        heads=model["num_attention_heads"],
        head_dim=model["head_dim"],
        context=model["max_position_embeddings"],
        theta=model["rope_parameters"]["rope_theta"],
        vocabulary=values["tokenizer"]["vocab_size"],
        table=table(figures),
        overlap=overlap(seen),
        tokens=last["tokens"] / 1e6,
        epochs=last["tokens"] / facts["tokens"],
        steps=last["step"],
        batch=train["batch_size"],
        block=values["data"]["block"],
        lr=train["lr"],
        minutes=last["seconds"] / 60,
        final=last["loss"],
        python=manifest["python"],
        sources=sources(manifest),
        samples="".join(f"\n```\n{text}\n```\n" for text in samples.values()),
    )
