"""The state of a stream as named tensors, which may come from anybody's checkpoint: held to what a memory is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import AttnPatchError
from ..functional.finite import all_finite
from ..schema import brief

_LAYER = re.compile(r"(sinks\.)?(0|[1-9]\d{0,4})\.[kv]", re.ASCII)
_OWN = {"segments": 1, "columns": 0, "number": 2, "turned": 2, "count": 1, "shift": 1}  # name -> dimensions
_SINKS = {"sinks.number": 2, "sinks.turned": 2}
_LARGEST = 1 << 48  # of a token's number


def check_state(state: Any) -> dict[str, Tensor]:
    """Return the state of a stream after holding it to what one is.

    Raises:
        AttnPatchError: names the tensor, what was found and what was wanted.
    """
    if not isinstance(state, Mapping):
        raise AttnPatchError(f"the state of a stream is {brief(state)}; wanted a mapping of names to tensors.")
    strange = [name for name in state if not isinstance(name, str) or not _known(name)]
    if strange:
        raise AttnPatchError(f"the state of a stream: no tensor {brief(strange[0], 40)}; load what a stream returned.")
    held = {name: name.startswith("sinks.") for name in state if _LAYER.fullmatch(name)}
    whole = {**_OWN, **(_SINKS if any(name.startswith("sinks.") for name in state) else {})}
    pairs = [f"{name[:-1]}{side}" for name in held for side in "kv"]
    missing = next((name for name in (*whole, *pairs) if name not in state), None)
    if missing is not None:
        raise AttnPatchError(f"the state of a stream: {missing} is missing; load what a stream returned.")
    for name, dimensions in whole.items():
        _check_numbers(name, state[name], dimensions)
    _check_rows(state, whole)
    for name, sinks in held.items():
        _check_keys(name, state[name], state["sinks.number" if sinks else "number"])
    _check_layers(state, held)
    return dict(state)


def _known(name: str) -> bool:
    return name in _OWN or name in _SINKS or bool(_LAYER.fullmatch(name))


def _wrong(name: str, found: str, wanted: str) -> AttnPatchError:
    return AttnPatchError(f"the state of a stream: {name} is {found}; wanted {wanted}.")


def _said(value: Any) -> str:
    if not isinstance(value, Tensor):
        return brief(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _check_numbers(name: str, value: Any, dimensions: int) -> None:
    if not isinstance(value, Tensor) or value.is_meta or value.dtype != torch.int64 or value.dim() != dimensions:
        raise _wrong(name, _said(value), f"int64 of {dimensions} dimensions")
    least = -_LARGEST if name == "shift" else -1 if "number" in name or "turned" in name else 0
    if value.numel() and not least <= int(value.min()) <= int(value.max()) < _LARGEST:
        raise _wrong(name, f"from {int(value.min())} to {int(value.max())}", f"{least} to {_LARGEST}")


def _check_rows(state: Mapping[str, Tensor], whole: Mapping[str, int]) -> None:
    rows = len(state["count"])
    for name in whole:
        if name not in ("segments", "columns") and len(state[name]) != rows:
            raise _wrong(name, _said(state[name]), f"{rows} rows, as count has")
    for number, turned in (("number", "turned"), ("sinks.number", "sinks.turned")):
        if number in whole and state[number].shape != state[turned].shape:
            raise _wrong(turned, _said(state[turned]), f"the shape of {number}, {tuple(state[number].shape)}")


def _check_keys(name: str, value: Any, number: Tensor) -> None:
    fits = isinstance(value, Tensor) and not value.is_meta and value.is_floating_point() and value.dim() == 4
    if not fits or (value.shape[0], value.shape[2]) != tuple(number.shape):
        raise _wrong(name, _said(value), f"floats of (batch, kv heads, held, d), {tuple(number.shape)} of them held")
    if not all_finite(value):
        raise _wrong(name, "not finite", "finite numbers")


def _check_layers(state: Mapping[str, Tensor], held: Mapping[str, bool]) -> None:
    for name in held:
        other = state[f"{name[:-1]}{'v' if name[-1] == 'k' else 'k'}"]
        if state[name].shape[1] != other.shape[1] or state[name].dtype != other.dtype:
            raise _wrong(name, _said(state[name]), f"heads and dtype of the other of its layer, {_said(other)}")
    layers, sinks = ({n.split(".")[-2] for n, s in held.items() if s is which} for which in (False, True))
    if sinks and layers != sinks:
        raise _wrong("sinks", f"of {len(sinks)} layers", f"the {len(layers)} layers of the memory")
