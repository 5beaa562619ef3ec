"""Classifies torch operations: limited by their products, or by a loop over their elements."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

Size = tuple[tuple[str, int], ...]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear", "matmul")
STREAMS = ("copy", "pointwise", "reduce", "softmax", "silu", "gelu", "exp")
_COPIES = (
    *("cat", "clone", "copy", "to_copy", "embedding", "index", "gather", "stack", "contiguous", "scatter", "repeat"),
    *("constant_pad", "slice_backward", "select_backward", "fill", "zero", "new_", "full"),
)
_REDUCES = ("mean", "sum", "max", "min", "amax", "amin", "norm", "any", "all", "argmax", "var", "cumsum")
_EXPONENTIAL = ("exp", "sigmoid", "tanh", "erf", "cos", "sin", "log", "rsqrt", "sqrt", "softplus", "pow")
_FORWARD = 2  # products of scores with keys, of weights with values
_BACKWARD = 5  # the scores again, and two for each of the products


def kind_of(name: str, *, in_place: bool, view: bool) -> str:
    """Return what limits an operation.

    Args:
        name: without namespace and overload.
        in_place: whether it makes nothing new.
        view: whether torch says that its result is a view.
    """
    if name in PRODUCTS:
        return "matmul"
    if "attention" in name:
        return "attention_backward" if "backward" in name else "attention"
    if view or name in ("lift_fresh", "detach", "_unsafe_view", "empty", "empty_like", "alias"):
        return "view"
    plain = name.rstrip("_").lstrip("_") if in_place else name.lstrip("_")
    for kind in ("softmax", "silu", "gelu"):
        if kind in plain:
            return kind
    if plain in ("pow", "pow_backward"):
        return "pointwise"  # torch squares by a product; other powers are rare
    for kind, names in (("copy", _COPIES), ("exp", _EXPONENTIAL), ("reduce", _REDUCES)):
        if plain.startswith(names):
            return kind
    return "pointwise"


def matmul_shape(name: str, kind: str, given: list[Tensor], args: Any, kwargs: Any) -> tuple[int, Size]:
    """Return the multiplications and additions of an operation, and what their speed depends on."""
    if kind == "matmul":
        return _product(name, given)
    if not kind.startswith("attention"):
        return 0, ()
    query, key, value = [t for t in given if t.dim() == 4][kind.endswith("backward") :][:3]
    batch, heads, queries, dim = query.shape
    keys, masked = key.shape[2], any(t.shape[-1] == key.shape[2] and t is not key for t in given[3:])
    causal = not masked and queries > 1 and bool(kwargs.get("is_causal", any(a is True for a in args)))
    products = _BACKWARD if kind.endswith("backward") else _FORWARD
    flops = products * batch * heads * queries * keys * (dim + value.shape[-1]) // (1 + causal)
    sizes = {
        "queries": queries,
        "keys": keys,
        "heads": batch * key.shape[1],
        "head_dim": dim,
        "group": heads // key.shape[1],
        "causal": int(causal),
    }
    return flops, tuple(sizes.items())


def _product(name: str, given: list[Tensor]) -> tuple[int, Size]:
    left, right = (given[1:3] if name in ("addmm", "baddbmm") else given[:2])[:2]
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    batch = math.prod(left.shape[:-2])
    size = {"rows": rows, "inner": inner, "columns": columns, "batch": batch}
    return 2 * batch * rows * inner * columns, tuple(size.items())
