"""Which attention modules of a model turn keys by position, over the whole text, and how: found by turning them.

The model runs twice, with every token at one position and then at another. What a module's keys did in between is
compared with each way of turning that there is, so that no table of families is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import record
from ..anatomy import Anatomy
from ..attention.listener import Listener
from ..attention.masks import mask_of
from ..attention.registry import set_kernel
from ..attention.wrapper import AddWrapper
from ..edits import AddPreHook, Edit
from ..errors import UnsupportedArchitecture
from ..functional.rerotation import Turning
from ..probe import TOLERANCE, default_inputs, largest_difference, logits_under
from ..sites import dispatching, in_tower
from ..upstream import words
from ..upstream.roles import frequencies, roles_of
from .modules import ShiftedAngles

STATIC = ("default", "linear", "yarn", "llama3", "proportional")  # the same angles at every length
_BY = 7  # positions between the two runs
Found = dict[str, tuple[str, str, bool, int]]  # module -> rotary module, its buffer, interleaved, first dimension


def survey(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Found, list[str]]:
    """Return the modules whose distances can be changed, and sentences on those that are left alone.

    Raises:
        UnsupportedArchitecture: there are none, or one that looks back at everything turns keys in an unknown way.
    """
    anatomy = dataclasses.replace(anatomy, rotary=tuple(r for r in anatomy.rotary if not in_tower(r.path)))
    _check_rotary(model, anatomy)
    places = dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
    paths = [place.path for place in places]
    before, after = _listen(model, anatomy, paths, 0), _listen(model, anatomy, paths, _BY)
    found: Found = {}
    notes: dict[str, list[str]] = {}
    for path in paths:
        why = _other(before[path])
        if why is None and largest_difference(before[path].calls[0].key, after[path].calls[0].key) < 1e-3:
            why = "no rotation"
        if why is None:
            found[path] = _way(model, anatomy, path, before[path], after[path])
        else:
            notes.setdefault(why, []).append(path)
    if not found:
        reasons = "; ".join(f"{where[0]}: {why}" for why, where in notes.items())
        raise UnsupportedArchitecture(f"{anatomy.architecture}: no layer looks back at everything ({reasons}).")
    return found, [f"left alone, {why}: {len(where)} layers ({where[0]} ...)" for why, where in notes.items()]


def _check_rotary(model: PreTrainedModel, anatomy: Anatomy) -> None:
    if not anatomy.rotary:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: distances are changed by turning rotary states further; positions here are: "
            f"{anatomy.positions}."
        )
    earlier = record.read(model.config)
    if earlier is not None and any(spec.get("per_request") for spec in earlier.patches):
        raise UnsupportedArchitecture(
            f"{anatomy.rotary[0].path}: its angles are chosen for each request and row, so that keys cannot be turned "
            "further; use a static scaling beneath."
        )
    for rotary in anatomy.rotary:
        kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, Mapping) else [rotary.rope_type]
        moving = next((kind for kind in kinds if kind not in STATIC), None)
        if moving is not None:
            raise UnsupportedArchitecture(
                f"{rotary.path}: {moving!r} angles depend on the length of the text, so that keys in a cache cannot be "
                f"turned further; use one of {', '.join(STATIC)} beneath."
            )
        config = getattr(model.get_submodule(rotary.path), "config", None)
        if words.AXES in str(getattr(config, "rope_parameters", "")):
            raise UnsupportedArchitecture(
                f"{rotary.path}: positions in several dimensions (M-RoPE of images); one distance is no measure."
            )


def _listen(model: PreTrainedModel, anatomy: Anatomy, paths: list[str], place: int) -> dict[str, Listener]:
    listeners = {path: Listener() for path in paths}
    edits: list[Edit] = [AddWrapper(path, listener) for path, listener in listeners.items()]
    for rotary in anatomy.rotary:
        roles = roles_of(model.get_submodule(rotary.path))
        if not roles.takes(words.POSITIONS):
            raise UnsupportedArchitecture(f"{rotary.path}: {rotary.kind} takes no positions to try other ones with.")
        edits.append(AddPreHook(rotary.path, ShiftedAngles(roles, place), "another position"))
    logits_under(model, [*edits, set_kernel("eager")], default_inputs(model))
    silent = next((path for path, listener in listeners.items() if not listener.calls), None)
    if silent is not None:
        raise UnsupportedArchitecture(f"{silent}: was not run on a few tokens, so that nothing is known of it.")
    return listeners


def _other(listener: Listener) -> str | None:
    """Say why a module is not one that looks back at everything, or None."""
    call = listener.calls[0]
    if call.given.get(words.WINDOW) is not None:
        return f"a window of {call.given[words.WINDOW]} tokens"
    made = mask_of(call.mask)
    if made is None or made.positions() is None:
        return "a mask of their own"
    return None


def _way(
    model: PreTrainedModel, anatomy: Anatomy, path: str, before: Listener, after: Listener
) -> tuple[str, str, bool, int]:
    query, key = before.calls[0].query, before.calls[0].key
    allowed = 5 * max(TOLERANCE.get(key.dtype, 1e-2), TOLERANCE[torch.float32])
    for rotary, buffer, turning in _ways(model, anatomy, key.shape[-1]):
        turned = [turning.turn(t, turning.table(torch.full((t.shape[2],), _BY), t.dtype)) for t in (query, key)]
        if all(
            largest_difference(now, then) <= allowed
            for now, then in zip((after.calls[0].query, after.calls[0].key), turned, strict=True)
        ):
            return rotary, buffer, turning.interleaved, turning.first
    raise UnsupportedArchitecture(
        f"{path}: its keys turn with position in none of the ways that are known, by the frequencies found in "
        f"{', '.join(sorted(_read(model, anatomy))) or 'no buffer'} (halves or neighbours, all of a head, "
        "its first or its last dimensions), so that they cannot be turned further."
    )


def _read(model: PreTrainedModel, anatomy: Anatomy) -> set[str]:
    return {f"{r.path}.{name}" for r in anatomy.rotary for name in frequencies(model.get_submodule(r.path))}


def _ways(model: PreTrainedModel, anatomy: Anatomy, width: int) -> Iterator[tuple[str, str, Turning]]:
    for rotary in anatomy.rotary:
        module: nn.Module = model.get_submodule(rotary.path)
        for name, buffer in frequencies(module).items():
            if "original" in name or 2 * len(buffer) > width:
                continue
            for first in dict.fromkeys((0, width - 2 * len(buffer))):
                for interleaved in (False, True):
                    yield rotary.path, name, Turning(buffer, interleaved, first)


def as_found(value: Any) -> Found:
    """Read :data:`Found` from a record, where tuples are lists."""
    return {str(path): (str(r), str(b), bool(i), int(f)) for path, (r, b, i, f) in dict(value).items()}


__all__ = ["Found", "Tensor", "as_found", "survey"]
