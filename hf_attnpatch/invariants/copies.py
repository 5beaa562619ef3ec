"""Invariants of copies and checkpoints: they give the same bits."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import foreign
from ..backends import FLAG
from ..probe import _counting, input_device
from ..upstream.find import auto_classes
from .subject import Answer, Measured, Subject, compare


def copied(subject: Subject) -> Answer:
    """A deep copy gives the same bits, from its own weights."""
    wanted = subject.logits()
    twin = Subject(copy.deepcopy(subject.model), subject.anatomy, subject.inputs)
    same, own = compare(subject, wanted, twin.logits(), 0.0), []
    matrices, all_of_them = _matrices(twin)
    for matrix in matrices:
        matrix.neg_()
        own.append(not torch.equal(twin.logits(), wanted))
        matrix.neg_()
    if not (all(own) if all_of_them else any(own)):
        return Measured(math.inf, 0.0, "the copy computes with other weights than its own")
    return same


def _matrices(subject: Subject) -> tuple[list[Tensor], bool]:
    """Return the projections of the first attention module that runs, all of which matter; else the model's."""
    paths = tuple(site.path for site in subject.anatomy.sites)
    with _counting(subject.model, paths) as calls:
        subject.run()
    first = next((path for path in paths if calls[path]), None)
    module = subject.model if first is None else subject.model.get_submodule(first)
    return [p for p in module.parameters() if p.dim() == 2 and p.any()], first is not None


def saved_and_loaded(subject: Subject) -> Answer:
    """A checkpoint, loaded through its Auto class, gives the same bits."""
    return _reloaded(subject, "50GB")


def saved_in_shards_and_loaded(subject: Subject) -> Answer:
    """A checkpoint in several files gives the same bits."""
    size = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return _reloaded(subject, max(size // 3, 1))


def _reloaded(subject: Subject, shard: int | str) -> Answer:
    model, wanted = subject.model, subject.logits()
    with tempfile.TemporaryDirectory() as folder, _no_progress_bars():
        model.save_pretrained(folder, max_shard_size=shard)
        attention = model.config._attn_implementation
        own = attention not in ("eager", *FLAG) and not any(
            site.dispatches for site in subject.anatomy.sites if not site.tower
        )
        known = {} if own else {"attn_implementation": attention}  # a name of ours for forwards that stay says nothing
        loaded = _loader(model).from_pretrained(folder, dtype=model.dtype, trust_remote_code=False, **known)
    for tensor in loaded.parameters():  # files are unaligned, and some kernels round by alignment
        tensor.data = tensor.data.clone()
    twin = Subject(loaded.to(input_device(model)).eval(), subject.anatomy, subject.inputs)
    same = loaded.config._attn_implementation == attention  # else another kernel
    return compare(subject, wanted, twin.logits(), 0.0 if same else subject.rounding)


def _loader(model: PreTrainedModel) -> Any:
    """Return the Auto class for this model, or its own class if there is none: no code of a checkpoint runs."""
    name = type(model).__name__.removeprefix("Patched")
    for auto, cls in foreign._auto_models(type(model.config)).items():
        if cls.removeprefix("Patched") == name:
            return getattr(auto_classes(), auto)
    return foreign.twin_of(name, model.config) or type(model)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
