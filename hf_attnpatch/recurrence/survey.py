"""Finds how each attention module rotates its keys, by running the model at two positions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import kernel_of, set_kernel
from ..attention.rotation import rotation_of
from ..attention.wrapper import HELD, AddWrapper, Listener
from ..edits import AddPreHook, Edit
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..positions.keys import BY, Way, allowed, way_of
from ..probe import default_inputs, largest_difference, logits_under, tokens_of, trace
from ..upstream import words
from ..upstream.roles import roles_of
from .native import ObserveKeys


def ways(model: PreTrainedModel, anatomy: Anatomy, paths: Sequence[str]) -> dict[str, Way | None]:
    """Return how each attention module rotates its keys; None for one that does not.

    Raises:
        UnsupportedArchitecture: a module rotates them in an unknown way.
    """
    if anatomy.turned:
        held = {path: rotation_of(model.get_submodule(path)) for path in paths}
        return {path: None if r is None else (path, HELD, r.interleaved, 0) for path, r in held.items()}
    if not (anatomy.rotary or anatomy.inner):
        return dict.fromkeys(paths)
    native = not anatomy.sites or anatomy.native
    before, after = (_keys(model, paths, place, native) for place in (0, BY))
    return {path: _way(model, anatomy, path, before[path], after[path]) for path in paths}


def check_agrees(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit], padded: bool) -> None:
    """Refuse a model that uses its attention mask in a way that the memory cannot replace.

    Args:
        model: without a memory.
        anatomy: the model's anatomy.
        edits: add a memory, read in several pieces, that covers the whole probe and so changes nothing.
        padded: whether to check padding, too; added positions count padding in a plain call only.

    Raises:
        UnsupportedArchitecture: the model does not run with a memory, or its logits change.
    """
    inputs = default_inputs(model)
    inputs = inputs if padded else roles_of(model).call(**{words.TOKENS: tokens_of(model, inputs)})
    try:
        found = logits_under(model, edits, inputs)
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: does not run with a memory instead of its mask ({cause})."
        ) from error
    apart = largest_difference(trace(model, inputs).logits, found)
    if apart > allowed(found.dtype):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: read in segments with a memory of the whole past, its logits differ by "
            f"{apart:.2g} of their size, {allowed(found.dtype):.0e} allowed: it uses positions or masks in its own way."
        )


def _keys(model: PreTrainedModel, paths: Sequence[str], place: int, native: bool) -> dict[str, Tensor]:
    heard: dict[str, list[Tensor]] = {path: [] for path in paths}
    listeners = {path: Listener() for path in paths}
    edits: list[Edit] = []
    if native:
        edits += [
            AddPreHook(
                path, ObserveKeys(roles_of(model.get_submodule(path)), functools.partial(_hear, keys)), "listens"
            )
            for path, keys in heard.items()
        ]
    else:
        edits += [AddWrapper(path, listener) for path, listener in listeners.items()]
        edits.append(set_kernel(kernel_of(model.config._attn_implementation)))
    ids = tokens_of(model, default_inputs(model))[:1]
    if not roles_of(model).takes(words.POSITIONS):
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: its forward takes no positions, so other ones cannot be tried."
        )
    at = {words.TOKENS: ids, words.MASK: torch.ones_like(ids), words.POSITIONS: torch.full_like(ids, place)}
    logits_under(model, edits, roles_of(model).call(**at))
    for path, keys in heard.items():
        keys += [call.key for call in listeners[path].calls]
    silent = next((path for path, keys in heard.items() if len(keys) != 1), None)
    if silent is not None:
        raise UnsupportedArchitecture(
            f"{silent}: ran {len(heard[silent])} times in one forward, must run once, with its own memory."
        )
    return {path: keys[0] for path, keys in heard.items()}


def _hear(keys: list[Tensor], key: Tensor, _: Tensor) -> None:
    keys.append(key.detach())


def _way(model: PreTrainedModel, anatomy: Anatomy, path: str, before: Tensor, after: Tensor) -> Way | None:
    if largest_difference(before, after) <= allowed(before.dtype) / 5:
        return None
    found = way_of(model, anatomy, [(before, after)])
    if found is None:
        raise UnsupportedArchitecture(
            f"{path}: its keys rotate with position in no known way (halves or neighbours, all of a "
            "head, its first or its last dimensions); positions='running' needs no rotation."
        )
    return found
