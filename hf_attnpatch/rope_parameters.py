"""transformers' ``rope_parameters`` dictionary: put one scaling on top of another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .errors import AttnPatchError
from .functional import rotary

KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
STATIC = ("linear", "yarn", "llama3")  # the same angles at every length: any of them can be written as longrope
_SCHEME = frozenset(  # what describes a scaling; every other key belongs to the model and is kept
    "rope_type type factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor "
    "high_freq_factor long_factor short_factor long_mscale short_mscale".split()
)


def check_number(name: str, value: object, at_least: float | None = None) -> None:
    """Refuse what is not a finite number above 0 (or at least ``at_least``).

    Raises:
        AttnPatchError: says the field, what was found and what was wanted.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value <= 0 if at_least is None else value < at_least):  # type: ignore[operator]  # a number by now
        wanted = "above 0" if at_least is None else f"of at least {at_least:g}"
        raise AttnPatchError(f"{name} is {value!r}; it must be a finite number {wanted}.")


def checked_factors(name: str, value: object, kind: str) -> tuple[float, ...] | None:
    """Return per-frequency divisors as a tuple.

    Raises:
        AttnPatchError: not a list of finite numbers above 0, or given for another kind than ``longrope``.
    """
    if value is None:
        return None
    if kind != "longrope":
        raise AttnPatchError(f"{name} belongs to kind='longrope'; kind={kind!r} would ignore it.")
    if not isinstance(value, (list, tuple)):
        raise AttnPatchError(f"{name} is {value!r}; it must be a list, one divisor for each rotated frequency.")
    for i, each in enumerate(value):
        check_number(f"{name}[{i}]", each)
    return tuple(float(each) for each in value)


class Scaling(Protocol):
    """The fields of ``RopeScaling`` that say how to scale."""

    @property
    def kind(self) -> str: ...  # noqa: D102 - see RopeScaling
    @property
    def factor(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def beta_fast(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def beta_slow(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def low_freq_factor(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def high_freq_factor(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def long_factor(self) -> tuple[float, ...] | None: ...  # noqa: D102 - see RopeScaling
    @property
    def short_factor(self) -> tuple[float, ...] | None: ...  # noqa: D102 - see RopeScaling
    @property
    def attention_factor(self) -> float | None: ...  # noqa: D102 - see RopeScaling


@dataclass(frozen=True)
class Window:
    """What a rotary module does now.

    Attributes:
        length: context in tokens that it serves now.
        frequencies: radians per position, shape (rotary_dim / 2,).
        attention: factor on cos and sin.
    """

    length: int
    frequencies: Tensor
    attention: float


def scaled(want: Scaling, old: Mapping[str, Any], window: Window, compose: bool = False) -> dict[str, Any]:
    """Return the parameters that multiply ``old`` by the wanted scaling.

    Args:
        want: kind and factor.
        old: what the config has now.
        window: what the rotary module does now.
        compose: write a static kind as ``longrope`` even where its own name would do.

    Raises:
        AttnPatchError: the present kind changes with the length, and the wanted one is another.
    """
    present = old.get("rope_type", "default")
    kept = {key: value for key, value in old.items() if key not in _SCHEME}
    if present == "proportional" and want.kind == "linear":  # its own factor does what linear does
        return {**old, "factor": float(old.get("factor") or 1.0) * float(want.factor)}
    if not compose and (present == "default" or (present == want.kind and want.kind != "longrope")):
        return {**kept, **_same_kind(want, old if present == want.kind else {}, window)}
    if "dynamic" in (present, want.kind) or present not in ("default", *KINDS):
        raise AttnPatchError(
            f"rope_parameters: the model has {present!r} scaling, which {want.kind!r} cannot multiply; "
            + (f"use kind={present!r}." if present in KINDS else "load it without that scaling if it can do without.")
        )
    return {**kept, **_composed(want, old, window)}


def _same_kind(want: Scaling, old: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """Return native parameters of the wanted kind, its factor multiplied by the one that is there."""
    factor = float(want.factor) * float(old.get("factor") or 1.0)
    trained = int(old.get("original_max_position_embeddings") or window.length)
    new: dict[str, Any] = {"rope_type": want.kind, "factor": factor}
    if want.kind == "yarn":
        options = {
            k: v for k, v in old.items() if k in ("mscale", "mscale_all_dim", "truncate", "beta_fast", "beta_slow")
        }
        new |= {"beta_fast": want.beta_fast, "beta_slow": want.beta_slow, **options}
        new |= {"original_max_position_embeddings": trained}
        if want.attention_factor is not None:
            new["attention_factor"] = float(want.attention_factor)
    elif want.kind == "llama3":
        bands = {"low_freq_factor": want.low_freq_factor, "high_freq_factor": want.high_freq_factor}
        new |= {key: float(old.get(key, value)) for key, value in bands.items()}
        new |= {"original_max_position_embeddings": trained}
    elif want.kind == "longrope":
        new |= _longrope(want, window, window.frequencies)
    return new


def _composed(want: Scaling, old: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """Return ``longrope`` parameters whose factors are the product of both scalings, frequency by frequency."""
    theta, dim = float(old["rope_theta"]), 2 * len(window.frequencies)
    unscaled = rotary.default(theta, dim)
    if want.kind == "longrope":
        return {"rope_type": "longrope", **_longrope(want, window, unscaled, old)}
    target = {
        "linear": lambda f: rotary.linear(f, want.factor),
        "yarn": lambda f: rotary.by_parts(f, want.factor, window.length, want.beta_fast, want.beta_slow),
        "llama3": lambda f: rotary.llama3(f, want.factor, window.length, want.low_freq_factor, want.high_freq_factor),
    }[want.kind](window.frequencies)
    attention = want.attention_factor or (rotary.yarn_attention(want.factor) if want.kind == "yarn" else 1.0)
    factors = (unscaled / target).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": list(factors),
        "factor": float(want.factor),
        "attention_factor": window.attention * attention,
        "original_max_position_embeddings": window.length,
    }


def _longrope(want: Scaling, window: Window, unscaled: Tensor, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return factors: within the present window what there is, beyond it the wanted (or YaRN's) divisors."""
    size = len(window.frequencies)
    for name, given in (("long_factor", want.long_factor), ("short_factor", want.short_factor)):
        if given is not None and len(given) != size:
            raise AttnPatchError(
                f"{name} has {len(given)} numbers; this model rotates {size} frequencies, one number each."
            )
    present = unscaled / window.frequencies
    beyond = rotary.by_parts(window.frequencies, want.factor, window.length, want.beta_fast, want.beta_slow)
    if old and old.get("rope_type") == "longrope":  # a switch is there already: beyond it, multiply what is there
        served = unscaled / unscaled.new_tensor(old["long_factor"])
        beyond = rotary.by_parts(served, want.factor, window.length, want.beta_fast, want.beta_slow)
    long = present.new_tensor(want.long_factor) * present if want.long_factor else unscaled / beyond
    short = present.new_tensor(want.short_factor) * present if want.short_factor else present
    attention = want.attention_factor or rotary.longrope_attention(want.factor, window.length)
    original = int((old or {}).get("original_max_position_embeddings") or window.length)
    return {
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "factor": float(want.factor),
        "attention_factor": window.attention * attention,
        "original_max_position_embeddings": original,
    }
