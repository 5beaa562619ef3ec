"""The fields of a rope scaling, and checks of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import AttnPatchError

# kinds whose angles do not depend on the length: each can be written as longrope
STATIC = ("linear", "ntk", "ntk_by_parts", "yarn", "llama3", "resonance", "clipped")
KINDS = (*STATIC, "longrope", "dynamic", "dynamic_yarn")
ALWAYS_CHANGE = ("resonance", "clipped")  # change angles even at a factor of 1
SHARPENED = ("yarn", "dynamic_yarn", "longrope")  # kinds with their own factor on cos and sin


def check_number(name: str, value: object, at_least: float | None = None) -> None:
    """Refuse what is not a finite number above 0 (or at least ``at_least``).

    Raises:
        AttnPatchError: names the field, what was found and what is allowed.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value <= 0 if at_least is None else value < at_least):  # type: ignore[operator]  # a number by now
        wanted = "above 0" if at_least is None else f"of at least {at_least:g}"
        raise AttnPatchError(f"{name} is {value!r}; it must be a finite number {wanted}.")


def check_reach(factor: object, target_length: object) -> None:
    """Refuse a length to reach that is given twice, or is neither a multiple of at least 1 nor a number of tokens.

    Raises:
        AttnPatchError: names the field, what was found and what is allowed.
    """
    if factor is not None:
        check_number("factor", factor, at_least=1)
    tokens = isinstance(target_length, int) and not isinstance(target_length, bool) and target_length > 0
    if target_length is not None and not tokens:
        raise AttnPatchError(f"target_length is {target_length!r}; it must be a number of tokens, at least 1, or None.")
    if factor is not None and target_length is not None:
        raise AttnPatchError(
            f"target_length {target_length} and factor {factor:g} both say how far to reach; give one of them."
        )


def factor_to(target_length: int, trained_length: int) -> float:
    """Return the factor from a trained length to a target length, both in tokens.

    Raises:
        AttnPatchError: the target is shorter.
    """
    if target_length < trained_length:
        raise AttnPatchError(f"target_length {target_length} is below the {trained_length} tokens of the model.")
    return target_length / trained_length


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
    """The fields of ``RopeScaling`` that define a scaling."""

    @property
    def kind(self) -> str: ...  # noqa: D102 - see RopeScaling
    @property
    def factor(self) -> Any: ...  # noqa: D102 - a number by the time that angles are computed
    @property
    def beta_fast(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def beta_slow(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def low_freq_factor(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def high_freq_factor(self) -> float: ...  # noqa: D102 - see RopeScaling
    @property
    def long_factor(self) -> Sequence[float] | None: ...  # noqa: D102 - see RopeScaling
    @property
    def short_factor(self) -> Sequence[float] | None: ...  # noqa: D102 - see RopeScaling
    @property
    def attention_factor(self) -> float | None: ...  # noqa: D102 - see RopeScaling
    @property
    def layer_types(self) -> Sequence[str] | None: ...  # noqa: D102 - see RopeScaling
    @property
    def per_request(self) -> bool: ...  # noqa: D102 - see RopeScaling
    @property
    def trained_length(self) -> int | None: ...  # noqa: D102 - see RopeScaling
    @property
    def truncate(self) -> bool: ...  # noqa: D102 - see RopeScaling
    @property
    def clip_frequencies(self) -> int | None: ...  # noqa: D102 - see RopeScaling


def check_belonging(want: Scaling) -> None:
    """Refuse fields that belong to another kind, which would be ignored.

    Raises:
        AttnPatchError: names the field and the kinds that it belongs to.
    """
    ramps = ("yarn", "ntk_by_parts", "dynamic_yarn")
    for name, idle, kinds in (
        ("attention_factor", want.attention_factor is None, SHARPENED),
        ("truncate", want.truncate is True, ramps),
        ("clip_frequencies", want.clip_frequencies is None, ("clipped",)),
    ):
        if not idle and want.kind not in kinds:
            raise AttnPatchError(f"{name} belongs to kind={' or '.join(kinds)}; kind={want.kind!r} would ignore it.")
    for name in ("truncate", "per_request"):
        if getattr(want, name) not in (True, False) or not isinstance(getattr(want, name), bool):
            raise AttnPatchError(f"{name} is {getattr(want, name)!r}; it must be True or False.")
    if want.trained_length is not None and not want.per_request:
        raise AttnPatchError(
            "trained_length belongs to per_request=True; without, the config says what was trained on."
        )
    for name, least in (("clip_frequencies", 2), ("trained_length", 1)):
        count = getattr(want, name)
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
            raise AttnPatchError(f"{name} is {count!r}; it must be a number, at least {least}.")


def changes_something(want: Scaling) -> bool:
    """Return whether a scaling changes any angle."""
    return bool(want.factor != 1 or want.long_factor or want.short_factor or want.kind in ALWAYS_CHANGE)
