"""How each attention module turns its keys by position, found by running the model at one position and at another.

What keys did in between is compared with each way of turning that is known, so that no table of families is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy, angle_table
from ..attention.listener import Listener
from ..attention.registry import kernel_of, set_kernel
from ..attention.wrapper import AddWrapper
from ..edits import AddPreHook, Edit
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.rerotation import Turning
from ..probe import TOLERANCE, default_inputs, largest_difference, logits_under, tokens_of, trace
from ..upstream import words
from ..upstream.roles import frequencies, roles_of
from .attention import frequencies_of
from .native import Overhearing

STATIC = ("default", "linear", "yarn", "llama3", "proportional")  # the same angles at every length
_BY = 7  # positions between the two runs
Way = tuple[str, str, bool, int]  # rotary module, its buffer, interleaved, first dimension


def ways(model: PreTrainedModel, anatomy: Anatomy, paths: Sequence[str]) -> dict[str, Way | None]:
    """Return how each attention module turns its keys; None for one that does not.

    Raises:
        UnsupportedArchitecture: one turns them in a way that is not known.
    """
    if not (anatomy.rotary or anatomy.inner):
        return dict.fromkeys(paths)
    native = not any(site.dispatches for site in anatomy.sites)
    before, after = (_keys(model, paths, place, native) for place in (0, _BY))
    return {path: _way(model, anatomy, path, before[path], after[path]) for path in paths}


def check_agrees(model: PreTrainedModel, anatomy: Anatomy, edits: Sequence[Edit], padded: bool) -> None:
    """Refuse a model that does something of its own with its mask, in whose place the memory stands.

    Args:
        model: without a memory.
        anatomy: of it.
        edits: for a memory, read in several pieces, that reaches over the whole probe and so changes nothing.
        padded: whether padding is asked about, too: positions that are added count it in a plain call, and not later.

    Raises:
        UnsupportedArchitecture: it does not run so, or its logits are others.
    """
    inputs = default_inputs(model)
    inputs = inputs if padded else roles_of(model).call(**{words.TOKENS: tokens_of(model, inputs)})
    try:
        found = logits_under(model, edits, inputs)
    except AttnPatchError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: does not run with a memory in the place of its mask ({cause})."
        ) from error
    apart = largest_difference(trace(model, inputs).logits, found)
    if apart > _allowed(found.dtype):
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: read in segments with a memory of all that went before, its logits differ by "
            f"{apart:.2g} of their size, {_allowed(found.dtype):.0e} allowed: it does something of its own with "
            "positions or masks."
        )


def _keys(model: PreTrainedModel, paths: Sequence[str], place: int, native: bool) -> dict[str, Tensor]:
    heard: dict[str, list[Tensor]] = {path: [] for path in paths}
    listeners = {path: Listener() for path in paths}
    edits: list[Edit] = []
    if native:
        edits += [
            AddPreHook(
                path, Overhearing(roles_of(model.get_submodule(path)), functools.partial(_hear, keys)), "listens"
            )
            for path, keys in heard.items()
        ]
    else:
        edits += [AddWrapper(path, listener) for path, listener in listeners.items()]
        edits.append(set_kernel(kernel_of(model.config._attn_implementation)))
    ids = tokens_of(model, default_inputs(model))[:1]
    if not roles_of(model).takes(words.POSITIONS):
        raise UnsupportedArchitecture(f"{type(model).__name__}: its forward takes no positions to try other ones with.")
    at = {words.TOKENS: ids, words.MASK: torch.ones_like(ids), words.POSITIONS: torch.full_like(ids, place)}
    logits_under(model, edits, roles_of(model).call(**at))
    for path, keys in heard.items():
        keys += [call.key for call in listeners[path].calls]
    silent = next((path for path, keys in heard.items() if len(keys) != 1), None)
    if silent is not None:
        raise UnsupportedArchitecture(
            f"{silent}: ran {len(heard[silent])} times in one forward, wanted once, with a memory of its own."
        )
    return {path: keys[0] for path, keys in heard.items()}


def _hear(keys: list[Tensor], key: Tensor, _: Tensor) -> None:
    keys.append(key.detach())


def _way(model: PreTrainedModel, anatomy: Anatomy, path: str, before: Tensor, after: Tensor) -> Way | None:
    allowed = _allowed(before.dtype)
    if largest_difference(before, after) <= allowed / 5:
        return None
    for name, buffer, turning in _turnings(model, anatomy, before.shape[-1]):
        by = turning.table(torch.full((before.shape[2],), _BY, device=before.device), before.dtype)
        if largest_difference(after, turning.turn(before, by)) <= allowed:
            return name, buffer, turning.interleaved, turning.first
    raise UnsupportedArchitecture(
        f"{path}: its keys turn with position in none of the ways that are known (halves or neighbours, all of a head, "
        "its first or its last dimensions); positions='running' needs no turning."
    )


def _allowed(dtype: torch.dtype) -> float:
    """Angles are in fp32 whatever the model is in."""
    return 5 * max(TOLERANCE.get(dtype, 1e-2), TOLERANCE[torch.float32])


def _turnings(model: PreTrainedModel, anatomy: Anatomy, width: int) -> Iterator[tuple[str, str, Turning]]:
    for path in anatomy.inner:
        table = str(angle_table(model.get_submodule(path)))
        buffer = getattr(model.get_submodule(path), table)
        for interleaved in (False, True):
            yield path, table, Turning(frequencies_of(buffer), interleaved, 0)
    for rotary in anatomy.rotary:
        for name, buffer in frequencies(model.get_submodule(rotary.path)).items():
            if "original" in name or 2 * len(buffer) > width:
                continue
            for first in dict.fromkeys((0, width - 2 * len(buffer))):
                for interleaved in (False, True):
                    yield rotary.path, name, Turning(buffer, interleaved, first)
