"""Calibration text: checks what a user passed, shuffles it by the seed, and cuts it to what fits into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import AttnPatchError, CalibrationError
from ..probe import codebooks
from ..sites import Site
from .own_text import OwnText

PIECE = 4  # adjacent rows of one shape, if there are several shapes
ROOM = 16_000_000  # bytes of the values of one batch, for every head; more overflows caches and is slower

Batch = Mapping[str, Tensor]


def batches(calibration: Any, tokenizer: Any, model: PreTrainedModel, longest: int = 512) -> list[Batch]:
    """Read calibration text in any form that a user may pass.

    Args:
        calibration: token ids (sequences, length); an iterable of dictionaries of model inputs, padding masked; or
            strings, with ``tokenizer``; :class:`OwnText`, alone or among them, or ``"self"`` for it.
        tokenizer: for strings.
        model: the model to calibrate.
        longest: tokens of a row that strings are cut into.

    Raises:
        AttnPatchError: anything else, an empty one, ids out of range, strings without a tokenizer.
    """
    if codebooks(model) > 1:
        raise AttnPatchError(
            f"{type(model).__name__} reads a row of ids for each codebook, which calibration does not; leave it out."
        )
    calibration = OwnText() if isinstance(calibration, str) and calibration == "self" else calibration
    if isinstance(calibration, (Tensor, OwnText)):
        found = list(_items([calibration], tokenizer, model, longest))
    elif isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise AttnPatchError(
            f"calibration is a {type(calibration).__name__}; pass token ids of shape (sequences, length), dictionaries "
            "of model inputs, a list of strings with tokenizer=, or 'self'."
        )
    else:
        found = list(_items(list(calibration), tokenizer, model, longest))
    for batch in found:
        _check_ids(batch, model)
    if not sum(b["input_ids"].numel() for b in found):
        raise AttnPatchError("calibration is empty; pass at least a few thousand tokens of ordinary text.")
    return found


def _items(items: list[Any], tokenizer: Any, model: PreTrainedModel, longest: int) -> Iterator[Batch]:
    texts = [item for item in items if isinstance(item, str)]
    if texts and tokenizer is None:
        raise AttnPatchError("calibration holds strings; pass tokenizer= as well, the one of this model.")
    if texts:
        yield from _tokenized(texts, tokenizer, model, longest)
    for item in items:
        if isinstance(item, OwnText):
            yield {"input_ids": item.write(model)}
        elif isinstance(item, Tensor):
            yield {"input_ids": item if item.dim() != 1 else item[None]}
        elif isinstance(item, Mapping) and isinstance(item.get("input_ids"), Tensor):
            yield {k: v for k, v in item.items() if isinstance(v, Tensor) and k != "labels"}
        elif not isinstance(item, str):
            raise AttnPatchError(
                f"calibration holds a {type(item).__name__}; its items are strings, token tensors or dictionaries with "
                "a tensor input_ids."
            )


def _tokenized(texts: list[str], tokenizer: Any, model: PreTrainedModel, longest: int) -> Iterator[Batch]:
    """Cut every text into windows and stack them; the rest of a text becomes its own batch."""
    config = model.config.get_text_config(decoder=True)
    limit = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    whole: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        parts = [ids[start : start + limit] for start in range(0, len(ids), limit)]
        whole += [part for part in parts if len(part) == limit]
        yield from ({"input_ids": part[None]} for part in parts if 1 < len(part) < limit)
    if whole:
        yield {"input_ids": torch.stack(whole)}


def _check_ids(batch: Batch, model: PreTrainedModel) -> None:
    ids, vocabulary = batch["input_ids"], model.config.get_text_config(decoder=True).vocab_size
    if ids.dim() != 2 or ids.is_floating_point():
        raise AttnPatchError(
            f"calibration: input_ids are {ids.dtype} {tuple(ids.shape)}; wanted int64 (batch, length)."
        )
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise AttnPatchError(
            f"calibration: token ids from {int(ids.min())} to {int(ids.max())}, the vocabulary has {vocabulary}; "
            "tokenize with this model's own tokenizer."
        )


def check_amount(text: Sequence[Batch], sites: Sequence[Site]) -> None:
    """Refuse a text with fewer tokens than twice the rank of what is fitted to it.

    Raises:
        CalibrationError: too few tokens that are no padding.
    """
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in text]
    tokens, wanted = sum(int(m.sum()) for m in masks), 2 * max(s.num_heads * s.v_head_dim for s in sites)
    if tokens < wanted:
        raise CalibrationError(
            f"calibration has {tokens} tokens; output projections of {wanted // 2} inputs are fitted on it, which "
            f"takes {wanted} at the very least and 32768 to be good; pass more text, or fallback='principal'."
        )


def shuffled(found: Sequence[Batch], seed: int) -> list[Batch]:
    """Shuffle the rows of all batches by the seed, because some stages read the first ones only.

    Rows of one shape form one batch; if there are several shapes, they alternate in pieces of a few rows.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple[Any, ...], list[Batch]] = {}
    for batch in found:
        shape = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(batch.items()))
        groups.setdefault(shape, []).append(batch)
    whole = [{name: torch.cat([b[name].cpu() for b in group]) for name in group[0]} for group in groups.values()]
    out: list[Batch] = []
    for number in torch.randperm(len(whole), generator=generator).tolist():
        rows = len(whole[number]["input_ids"])
        order, size = torch.randperm(rows, generator=generator), rows if len(whole) == 1 else PIECE
        parts = [order[start : start + size] for start in range(0, rows, size)]
        out += [{name: tensor[part] for name, tensor in whole[number].items()} for part in parts]
    return [out[number] for number in torch.randperm(len(out), generator=generator)] if len(whole) > 1 else out


def first(found: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches, until they hold this many tokens."""
    out: list[Batch] = []
    for batch in found:
        if sum(b["input_ids"].numel() for b in out) >= tokens:
            break
        out.append(batch)
    return out


def split(found: Sequence[Batch], sites: Sequence[Site]) -> list[Batch]:
    """Cut batches so that their values, for every head, take no more than `ROOM`."""
    widest = max(s.num_heads * s.num_kv_heads * s.v_head_dim for s in sites)
    tokens = max(1, ROOM // (4 * widest))
    out: list[Batch] = []
    for batch in found:
        rows = max(1, tokens // batch["input_ids"].shape[1])
        for start in range(0, len(batch["input_ids"]), rows):
            out.append({name: tensor[start : start + rows] for name, tensor in batch.items()})
    return out
