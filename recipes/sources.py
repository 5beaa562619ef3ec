"""Resolves names in a configuration: models, and the two parts of the text that ships with the package."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_attnpatch import embedded
from hf_attnpatch.checkpoint import load, tokenizer_of
from recipes.data import DataConfig, DataError

MODEL = "embedded"
PARTS = ("embedded/uptrain", "embedded/evaluation")
EVERY = 3  # every third held-out document is for evaluation, the rest for uptraining


def locate(model: str) -> str:
    """The folder or hub name that `from_pretrained` takes."""
    return str(embedded.path()) if model == MODEL and not Path(model).exists() else model


def load_model(model: str, dtype: str) -> PreTrainedModel:
    """Loads a causal language model in eval mode, its weights in `dtype` (`auto`: the checkpoint's own)."""
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    return load(locate(model), dtype=kind).eval()


def load_tokenizer(model: str) -> Any:
    """Loads the tokenizer beside a model.

    Raises:
        DataError: there is none.
    """
    found = tokenizer_of(locate(model))
    if found is None:
        raise DataError(f"{model}: has no tokenizer to read text with; save one into its folder.")
    return found


def embedded_texts(source: str) -> list[str]:
    """One of two disjoint parts of the text that the embedded model was not pretrained on, all domains in both.

    Args:
        source: a part, or one domain of it: `embedded/uptrain`, `embedded/uptrain/python`.

    Raises:
        DataError: there is no such part.
    """
    part, domain = next(((p, source[len(p) + 1 :]) for p in PARTS if f"{source}/".startswith(f"{p}/")), (source, ""))
    if part not in PARTS or domain not in ("", *embedded.DOMAINS):
        raise DataError(
            f"{source}: the package ships {' and '.join(PARTS)}, whole or with a domain behind them "
            f"({', '.join(embedded.DOMAINS)}); correct the source."
        )
    chosen = []
    for name in [domain] if domain else embedded.DOMAINS:
        for number, text in enumerate(embedded.heldout(name)):
            if (number % EVERY == 0) == (part == PARTS[1]):
                chosen.append(text)
    return chosen


def resolve(config: DataConfig) -> DataConfig:
    """Replaces a source `embedded/...` by a file in the cache that holds it; other sources stay as they are."""
    if not config.source.startswith(f"{MODEL}/") or Path(config.source).exists():
        return config
    path = Path(config.cache) / f"{config.source.replace('/', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    rows = (json.dumps({config.field: text}) + "\n" for text in embedded_texts(config.source))
    temporary.write_text("".join(rows), "utf-8")
    os.replace(temporary, path)
    return dataclasses.replace(config, source=str(path))
