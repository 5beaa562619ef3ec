"""Measures a model's loss by context length and by position, and its retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.evaluation import Losses, perplexity, retrieval, summarise
from hf_attnpatch.evaluation.windows import Window, window_losses
from recipes.data import DataConfig, DataError, documents
from recipes.sources import resolve

Documents = dict[str, Tensor]


def read_documents(spec: Mapping[str, Any], tokenizer: Any) -> Documents:
    """Token ids of the documents that are long enough, by number, each shape (tokens,).

    Raises:
        DataError: there is none.
    """
    longest, found = max(spec["lengths"]), {}
    for number, text in enumerate(documents(resolve(DataConfig(source=spec["text"])))):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= longest:
            found[str(number)] = torch.tensor(ids)
    if not found:
        raise DataError(f"{spec['text']}: no document of {longest} tokens; give longer ones, or lower measure.lengths.")
    return dict(islice(found.items(), spec["documents"]))


def measure(model: PreTrainedModel, tokenizer: Any, texts: Documents, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Measures a model at every length; a refused length is a result, too.

    Returns:
        `lengths` (length -> losses of the targets by document, or `refused`), `positions` of the longest one (edges,
        nats and bounds of each bin), and `passkey` (length -> points by depth and their mean with its interval, or
        `refused`).
    """
    found: dict[str, Any] = {"lengths": {}, "positions": None}
    for length in spec["lengths"]:
        try:
            rows = _rows(model, texts, length, spec["batch_tokens"])
        except AttnPatchError as error:
            found["lengths"][str(length)] = {"refused": str(error)}
            continue
        targets = {
            name: [round(float(row[-spec["targets"] :].sum()), 4), spec["targets"]] for name, row in rows.items()
        }
        found["lengths"][str(length)] = {"losses": targets}
        if length == max(spec["lengths"]):
            found["positions"] = by_position(rows, spec["bins"])
    if spec["passkey"] is not None:
        found["passkey"] = {str(n): _passkey(model, tokenizer, n, spec) for n in spec["lengths"]}
    return found


def _rows(model: PreTrainedModel, texts: Documents, length: int, batch_tokens: int) -> dict[str, Tensor]:
    """Nats of all tokens but the first of each document's last `length` ones, shape (length - 1,), float64."""
    windows = [Window(length, name, ids[-length:], length - 1) for name, ids in texts.items()]
    rows = window_losses(model, windows, batch_tokens=batch_tokens, progress=f"{length} tokens")
    return {str(window.document): row for window, row in rows}


def by_position(rows: Mapping[str, Tensor], bins: int) -> dict[str, Any]:
    """Mean loss by how many tokens precede, with intervals over documents."""
    count = len(next(iter(rows.values())))
    edges = [count * number // bins for number in range(bins + 1)]
    losses: list[Losses] = [{k: (float(r[a:b].sum()), b - a) for k, r in rows.items()} for a, b in pairwise(edges)]
    scores = [summarise(each) for each in losses]
    said = {key: [round(getattr(score, key), 5) for score in scores] for key in ("nats", "low", "high")}
    return {"edges": [edge + 1 for edge in edges], **said}


def baselines(model: PreTrainedModel, texts: Documents, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same targets by a model that sees its trained context only.

    Returns:
        `sliding`: losses by document where the window moves on with the targets; `stride`: by how many. The truncated
        window, one for all targets, is the shortest of the lengths.
    """
    window = min(spec["lengths"])
    found = perplexity(
        model,
        texts,
        lengths=(window,),
        targets=spec["targets"],
        window=window,
        stride=spec["sliding"],
        batch_tokens=spec["batch_tokens"],
    )
    return {"sliding": {"losses": {k: list(v) for k, v in found.sliding.losses.items()}}, "stride": spec["sliding"]}


def _passkey(model: PreTrainedModel, tokenizer: Any, length: int, spec: Mapping[str, Any]) -> dict[str, Any]:
    asked = spec["passkey"]
    try:
        found = retrieval(
            model,
            tokenizer,
            lengths=(length,),
            depths=asked["depths"],
            samples=asked["samples"],
            batch_tokens=spec["batch_tokens"],
        )
    except AttnPatchError as error:
        return {"refused": str(error)}
    mean = found.score()
    return {"points": list(found.grid()[0]), "mean": [round(each, 2) for each in (mean.value, mean.low, mean.high)]}
