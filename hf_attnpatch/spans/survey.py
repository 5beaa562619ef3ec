"""Which attention modules of a model turn keys by position, over the whole text, and how: found by turning them.

The model runs twice, with every token at one position and then at another. What a module's keys did in between is
compared with each way of turning that there is, so that no table of families is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from .. import record
from ..anatomy import Anatomy
from ..attention.listener import Listener
from ..attention.masks import mask_of
from ..attention.registry import set_kernel
from ..attention.rotation import rotation_of
from ..attention.wrapper import HELD, AddWrapper
from ..edits import AddPreHook, Edit
from ..errors import UnsupportedArchitecture
from ..positions.fusing import deferred
from ..positions.keys import BY, STATIC, Way, tables, way_of
from ..probe import default_inputs, largest_difference, logits_under
from ..sites import dispatching, in_tower
from ..upstream import words
from ..upstream.roles import roles_of
from .modules import ShiftedAngles

Found = dict[str, Way]  # by module


def survey(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Found, list[str]]:
    """Return the modules whose distances can be changed, and sentences on those that are left alone.

    Raises:
        UnsupportedArchitecture: there are none, or one that looks back at everything turns keys in an unknown way.
    """
    through = by_itself(model, anatomy)
    anatomy = dataclasses.replace(anatomy, rotary=tuple(r for r in anatomy.rotary if not in_tower(r.path)))
    places = [] if anatomy.native else dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
    paths = [place.path for place in places or anatomy.sites]
    if anatomy.turned and not anatomy.rotary:  # by this package, which knows how
        before = after = _listen(model, anatomy, through, paths, 0)
    else:
        _check_rotary(model, anatomy)
        before, after = _listen(model, anatomy, through, paths, 0), _listen(model, anatomy, through, paths, BY)
    found: Found = {}
    notes: dict[str, list[str]] = {}
    for path in paths:
        why, rotation = _other(before[path]), rotation_of(model.get_submodule(path))
        if why is None and rotation is not None:
            found[path] = (path, HELD, rotation.interleaved, 0)
            continue
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


def by_itself(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...]:
    """Return the edits by which attention runs through wrappers; densely, where it dispatches.

    Raises:
        UnsupportedArchitecture: modules compute their scores by themselves, and cannot be followed.
    """
    if not anatomy.native:
        return (set_kernel("eager"),)
    found = deferred(model, anatomy)
    if isinstance(found, str):
        raise UnsupportedArchitecture(
            f"{anatomy.sites[0].path}: {anatomy.sites[0].kind} computes its scores by itself and dispatches to no "
            f"attention function, and cannot be followed: {found}."
        )
    return found


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


def _listen(
    model: PreTrainedModel, anatomy: Anatomy, through: Sequence[Edit], paths: list[str], place: int
) -> dict[str, Listener]:
    listeners = {path: Listener() for path in paths}
    edits: list[Edit] = [AddWrapper(path, listener) for path, listener in listeners.items()]
    for rotary in anatomy.rotary:
        roles = roles_of(model.get_submodule(rotary.path))
        if not roles.takes(words.POSITIONS):
            raise UnsupportedArchitecture(f"{rotary.path}: {rotary.kind} takes no positions to try other ones with.")
        edits.append(AddPreHook(rotary.path, ShiftedAngles(roles, place), "another position"))
    logits_under(model, [*edits, *through], default_inputs(model))
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


def _way(model: PreTrainedModel, anatomy: Anatomy, path: str, before: Listener, after: Listener) -> Way:
    then, now = before.calls[0], after.calls[0]
    found = way_of(model, anatomy, [(then.query, now.query), (then.key, now.key)])
    if found is None:
        raise UnsupportedArchitecture(
            f"{path}: its keys turn with position in none of the ways that are known, by the frequencies found in "
            f"{', '.join(tables(model, anatomy)) or 'no buffer'} (halves or neighbours, all of a head, "
            "its first or its last dimensions), so that they cannot be turned further."
        )
    return found


__all__ = ["Found", "by_itself", "survey"]
