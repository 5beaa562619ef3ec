"""Finds the attention modules that rotate keys over the whole text, and how, by rotating them.

The model runs twice, with all tokens at one position and then at another. The change of a module's keys is compared
with every known rotation, so that no table of families is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from .. import record
from ..anatomy import Anatomy
from ..attention.masks import mask_of
from ..attention.registry import set_kernel
from ..attention.rotation import rotation_of
from ..attention.wrapper import HELD, AddWrapper, Listener
from ..edits import AddPreHook, Edit
from ..errors import UnsupportedArchitecture
from ..positions.fusing import deferred
from ..positions.keys import BY, STATIC, Way, tables, way_of
from ..probe import default_inputs, largest_difference, logits_under
from ..sites import dispatching, in_tower
from ..upstream import words
from ..upstream.roles import roles_of
from .modules import ShiftedAngles

Found = dict[str, Way]  # path of a module -> its rotation


def survey(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Found, list[str]]:
    """Return the modules whose distances can be remapped, and notes on those that are left alone.

    Raises:
        UnsupportedArchitecture: there are none, or one that attends to the whole past rotates keys in an unknown way.
    """
    through = by_itself(model, anatomy)
    anatomy = dataclasses.replace(anatomy, rotary=tuple(r for r in anatomy.rotary if not in_tower(r.path)))
    places = [] if anatomy.native else dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
    paths = [place.path for place in places or anatomy.sites]
    if anatomy.turned and not anatomy.rotary:  # rotated by this package
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
        raise UnsupportedArchitecture(f"{anatomy.architecture}: no layer attends to the whole past ({reasons}).")
    return found, [f"left alone, {why}: {len(where)} layers ({where[0]} ...)" for why, where in notes.items()]


def by_itself(model: PreTrainedModel, anatomy: Anatomy) -> tuple[Edit, ...]:
    """Return the edits that run attention through wrappers, densely if the modules dispatch.

    Raises:
        UnsupportedArchitecture: modules compute their own scores and cannot be followed.
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
            f"{anatomy.architecture}: distances are remapped by rotating rotary states further; positions here are: "
            f"{anatomy.positions}."
        )
    earlier = record.read(model.config)
    if earlier is not None and any(spec.get("per_request") for spec in earlier.patches):
        raise UnsupportedArchitecture(
            f"{anatomy.rotary[0].path}: its angles are chosen for each request and row, so keys cannot be rotated "
            f"further; "
            "use a static scaling beneath."
        )
    for rotary in anatomy.rotary:
        kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, Mapping) else [rotary.rope_type]
        moving = next((kind for kind in kinds if kind not in STATIC), None)
        if moving is not None:
            raise UnsupportedArchitecture(
                f"{rotary.path}: {moving!r} angles depend on the length of the text, so cached keys cannot be rotated "
                f"further; "
                f"use one of {', '.join(STATIC)} beneath."
            )
        config = getattr(model.get_submodule(rotary.path), "config", None)
        if words.AXES in str(getattr(config, "rope_parameters", "")):
            raise UnsupportedArchitecture(
                f"{rotary.path}: positions have several axes (M-RoPE of images), so there is no single distance."
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
        raise UnsupportedArchitecture(f"{silent}: did not run on a few tokens, so nothing is known of it.")
    return listeners


def _other(listener: Listener) -> str | None:
    """Return why a module does not attend to the whole past, or None."""
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
            f"{path}: its keys rotate with position in no known way, by the frequencies found in "
            f"{', '.join(tables(model, anatomy)) or 'no buffer'} (halves or neighbours, all of a head, "
            "its first or its last dimensions), so they cannot be rotated further."
        )
    return found


__all__ = ["Found", "by_itself", "survey"]
