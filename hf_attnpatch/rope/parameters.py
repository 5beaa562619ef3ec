"""transformers' ``rope_parameters`` dictionary: applies one scaling on top of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import AttnPatchError
from ..functional import rotary
from .fields import ALWAYS_CHANGE, KINDS, Scaling

_NATIVE = {"ntk": "default", "ntk_by_parts": "yarn"}  # kind -> the name under which transformers computes it
_ENDLESS = 1e30  # divides a frequency to zero in effect: an angle of 1e-24 at position 1e6 changes nothing
_SCHEME = frozenset(  # keys of a scaling; all others belong to the model and are kept
    "rope_type type factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate low_freq_factor "
    "high_freq_factor long_factor short_factor long_mscale short_mscale".split()
)


@dataclass(frozen=True)
class Window:
    """The present state of a rotary module.

    Attributes:
        length: context in tokens that it serves.
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
        old: the config's present parameters.
        window: the rotary module's present state.
        compose: write a static kind as ``longrope`` even if its own name would do.

    Raises:
        AttnPatchError: the present kind depends on the length, and the wanted one differs from it.
    """
    present = old.get("rope_type", "default")
    kept = {key: value for key, value in old.items() if key not in _SCHEME}
    if want.kind == "ntk" and len(window.frequencies) < 2:
        raise AttnPatchError("kind='ntk' spreads a factor over frequencies; this model rotates only one.")
    if present == "proportional" and want.kind == "linear":  # its own factor acts like linear scaling
        return {**old, "factor": float(old.get("factor") or 1.0) * float(want.factor)}
    if not compose and want.kind not in ALWAYS_CHANGE and (present == "default" or _multiplies(want.kind, old)):
        return {**kept, **_same_kind(want, {} if present == "default" else old, kept, window)}
    if "dynamic" in (present, want.kind) or present not in ("default", *KINDS):
        raise AttnPatchError(
            f"rope_parameters: the model has {present!r} scaling, which {want.kind!r} cannot multiply; "
            + (f"use kind={present!r}." if present in KINDS else "load it without that scaling if it can do without.")
        )
    return {**kept, **_composed(want, old, window)}


def _multiplies(kind: str, old: Mapping[str, Any]) -> bool:
    """Return whether the present scaling's own factor can be multiplied by the wanted one."""
    if kind in ("longrope", "ntk"):
        return False
    same = old.get("rope_type") == _NATIVE.get(kind, kind)
    return same and (kind != "ntk_by_parts" or old.get("attention_factor") == 1.0)


def _same_kind(want: Scaling, old: Mapping[str, Any], kept: Mapping[str, Any], window: Window) -> dict[str, Any]:
    """Return native parameters of the wanted kind, with the product of both factors."""
    factor = float(want.factor) * float(old.get("factor") or 1.0)
    trained = int(old.get("original_max_position_embeddings") or window.length)
    if want.kind == "ntk":
        theta = rotary.ntk_theta(float(kept["rope_theta"]), want.factor, 2 * len(window.frequencies))
        return {"rope_type": "default", "rope_theta": theta}
    new: dict[str, Any] = {"rope_type": _NATIVE.get(want.kind, want.kind), "factor": factor}
    if want.kind in ("yarn", "ntk_by_parts"):
        options = {
            k: v for k, v in old.items() if k in ("mscale", "mscale_all_dim", "truncate", "beta_fast", "beta_slow")
        }
        new |= {"beta_fast": want.beta_fast, "beta_slow": want.beta_slow}
        new |= {} if want.truncate else {"truncate": False}
        new |= {**options, "original_max_position_embeddings": trained}
        if want.kind == "ntk_by_parts" or want.attention_factor is not None:
            new["attention_factor"] = float(want.attention_factor or 1.0)
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
    switches = old.get("rope_type") == "longrope"  # then the frequencies beyond its own window are scaled
    served = unscaled / unscaled.new_tensor(old["long_factor"]) if switches else window.frequencies
    trained = int(old.get("original_max_position_embeddings") or window.length)
    attention = want.attention_factor or (rotary.yarn_attention(want.factor) if want.kind == "yarn" else 1.0)
    return {
        "rope_type": "longrope",
        "short_factor": _divisors(unscaled, _target(want, window.frequencies, window.length, trained)),
        "long_factor": _divisors(unscaled, _target(want, served, window.length, trained)),
        "factor": float(want.factor),
        "attention_factor": window.attention * attention,
        "original_max_position_embeddings": trained if switches else window.length,
    }


def _target(want: Scaling, frequencies: Tensor, length: int, trained: int) -> Tensor:
    """Return scaled frequencies.

    Args:
        want: a static kind.
        frequencies: the model's present ones.
        length: the window that they serve.
        trained: the window that the model was trained on.
    """
    if want.kind == "resonance":
        return rotary.resonance(frequencies, trained)
    if want.kind == "clipped":
        return rotary.clipped(frequencies, clip_count(want, len(frequencies)))
    if want.kind == "llama3":
        return rotary.llama3(frequencies, want.factor, length, want.low_freq_factor, want.high_freq_factor)
    if want.kind in ("yarn", "ntk_by_parts"):
        return rotary.by_parts(frequencies, want.factor, length, want.beta_fast, want.beta_slow)
    return {"linear": rotary.linear, "ntk": rotary.ntk}[want.kind](frequencies, want.factor)


def clip_count(want: Scaling, size: int) -> int:
    """Return how many frequencies ``clipped`` tapers: 20 of 64, as in the paper, by default.

    Raises:
        AttnPatchError: more than the model rotates.
    """
    count = max(2, round(size * 20 / 64)) if want.clip_frequencies is None else want.clip_frequencies
    if count > size:
        raise AttnPatchError(f"clip_frequencies is {count}; this model rotates {size} frequencies.")
    return count


def taken_over(want: Any, old: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Convert a length-dependent scaling to one per request: the wanted scaling, including the present one.

    Args:
        want: a ``RopeScaling``.
        old: ``dynamic`` or ``longrope`` parameters.

    Returns:
        The scaling beyond the window, and the parameters within it.

    Raises:
        AttnPatchError: another kind is wanted, or ``longrope`` divisors would have to be multiplied.
    """
    present = old["rope_type"]
    kept = {key: value for key, value in old.items() if key not in _SCHEME}
    if present == want.kind == "dynamic":
        factor = float(want.factor) * float(old.get("factor") or 1.0)
        return dataclasses.replace(want, factor=factor), {**kept, "rope_type": "default"}
    if present == want.kind == "longrope" and want.factor == 1 and not want.long_factor and not want.short_factor:
        ratios = tuple(long / short for long, short in zip(old["long_factor"], old["short_factor"], strict=True))
        beyond = dataclasses.replace(want, long_factor=ratios, attention_factor=1.0)  # the present scaling has one
        return beyond, {**old, "long_factor": list(old["short_factor"])}
    same = f"kind={present!r}" + (" and factor=1" if present == "longrope" else "")
    raise AttnPatchError(
        f"rope_parameters: the model has {present!r} scaling, which switches by length itself; per_request takes it "
        f"over with {same} and nothing else."
    )


def untruncated(parameters: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Return ``yarn`` parameters with ``truncate=False`` as ``longrope``, for one of several layer types.

    transformers 5.23 reads ``truncate`` beside the layer types instead of in them, and so drops it.

    Args:
        parameters: of the layer type.
        dim: twice the number of frequencies.
    """
    theta, factor = float(parameters["rope_theta"]), float(parameters["factor"])
    trained = int(parameters["original_max_position_embeddings"])
    turns = (float(parameters["beta_fast"]), float(parameters["beta_slow"]))
    divisors = _divisors(rotary.default(theta, dim), rotary.yarn(theta, dim, factor, trained, *turns, truncate=False))
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    attention = rotary.yarn_attention(factor)
    if mscale and all_dim:
        attention = rotary.yarn_attention(factor, mscale) / rotary.yarn_attention(factor, all_dim)
    return {
        **{key: value for key, value in parameters.items() if key not in _SCHEME},
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": list(divisors),
        "factor": factor,
        "attention_factor": float(parameters.get("attention_factor") or attention),
        "original_max_position_embeddings": trained,
    }


def _divisors(unscaled: Tensor, target: Tensor) -> list[float]:
    found: list[float] = (unscaled / target).clamp(max=_ENDLESS).tolist()
    return found


def _longrope(want: Scaling, window: Window, unscaled: Tensor, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return ``longrope`` factors: the present ones within the window, the wanted (or YaRN's) divisors beyond it."""
    size = len(window.frequencies)
    for name, given in (("long_factor", want.long_factor), ("short_factor", want.short_factor)):
        if given is not None and len(given) != size:
            raise AttnPatchError(
                f"{name} has {len(given)} numbers; this model rotates {size} frequencies, one number each."
            )
    present = unscaled / window.frequencies
    beyond = rotary.by_parts(window.frequencies, want.factor, window.length, want.beta_fast, want.beta_slow)
    original = window.length
    if old and old.get("rope_type") == "longrope":  # already switches: multiply the divisors beyond the window
        original = int(old["original_max_position_embeddings"])
        served = unscaled / unscaled.new_tensor(old["long_factor"])
        beyond = rotary.by_parts(served, want.factor, window.length, want.beta_fast, want.beta_slow)
    long = present.new_tensor(want.long_factor) * present if want.long_factor else unscaled / beyond
    short = present.new_tensor(want.short_factor) * present if want.short_factor else present
    attention = want.attention_factor or rotary.longrope_attention(want.factor, window.length)
    return {
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "factor": float(want.factor),
        "attention_factor": window.attention * attention,
        "original_max_position_embeddings": original,
    }
