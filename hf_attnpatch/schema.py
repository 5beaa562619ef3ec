"""Reads data from files that anybody may have written: by type and within bounds, or refused in one short line.

Records, plans, results, metrics and tables of rates pass through here. The result is plain JSON data, finite, of
bounded size and of the types that a dataclass declares; anything else is an :class:`AttnPatchError` that names the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import AttnPatchError

T = TypeVar("T")
LARGEST_FILE = 64 << 20  # bytes of JSON: the losses of many documents
LARGEST_YAML = 64 << 10  # bytes: a plan, a table of rates, the head of a card
_PART = 1 << 16  # bytes of the first read
_LARGEST_INTEGER, _LONGEST_TEXT, _DEEPEST, _MOST_VALUES = 2**63, 1 << 20, 32, 1 << 20


# YAML's features beyond JSON, and those that multiply data: a merge copies what it names.
_BEYOND = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "binary", "omap", "pairs", "set", "merge")}
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _BEYOND]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_CONSTRUCTORS = {tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag not in _BEYOND}


class _Loader(yaml.SafeLoader):
    """A YAML loader restricted to JSON's data model: no dates, sets, bytes or aliases."""

    yaml_implicit_resolvers = _RESOLVERS
    yaml_constructors = _CONSTRUCTORS

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node of the document, which no alias may be."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read; write it out")
        return super().compose_node(parent, index)


class _Aliasing(_Loader):
    """The same with aliases; their expansion is counted afterwards."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node of the document."""
        return yaml.SafeLoader.compose_node(self, parent, index)


def text_of(file: Path, largest: int = LARGEST_FILE) -> str:
    """Return the text of a file.

    Raises:
        AttnPatchError: it is too large, or not UTF-8.
        OSError: it cannot be read.
    """
    data = b""
    with open(file, "rb") as opened:
        while len(data) <= largest and (part := opened.read(max(_PART, len(data)))):  # room for as much as is there
            data += part
    if len(data) > largest:
        raise AttnPatchError(f"{file}: more than {largest:,} bytes, which is more than such a file has.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AttnPatchError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}).") from error


def from_json(text: str, where: str, *, finite: bool = True, unique: bool = False) -> Any:
    """Read JSON.

    Args:
        text: of a file.
        where: for the message.
        finite: whether infinities and nan are refused.
        unique: whether duplicate keys are refused.

    Raises:
        AttnPatchError: not JSON, or nested or sized beyond what such files are.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once if unique else None)
    except (ValueError, RecursionError) as error:  # including numbers with thousands of digits
        raise AttnPatchError(f"{where}: not JSON ({brief(str(error))}).") from error
    return plain(found, where, finite=finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {brief(key)!r} stands there twice; readers take one or the other")
        found[key] = value
    return found


def from_yaml(text: str, where: str, *, aliases: bool = False) -> Any:
    """Read YAML with JSON's data model.

    Args:
        text: of a file.
        where: for the message.
        aliases: whether aliases are allowed; each use counts in full.

    Raises:
        AttnPatchError: not YAML, more than JSON's data model, or nested or sized beyond what such files are.
    """
    if len(text) > LARGEST_YAML:
        raise AttnPatchError(f"{where}: {len(text):,} characters, wanted at most {LARGEST_YAML:,}.")
    try:
        found = yaml.load(text, _Aliasing if aliases else _Loader)  # noqa: S506 - a safe loader, made safer
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AttnPatchError(f"{where}: {brief(str(error), 200)}; write it as YAML.") from error
    return plain(found, where)


def plain(value: Any, where: str, *, finite: bool = True) -> Any:
    """Return a JSON value after checking its bounds.

    Args:
        value: from JSON or YAML.
        where: for the message.
        finite: whether infinities and nan are refused.

    Raises:
        AttnPatchError: it contains something else, or is too large, too deep or not finite.
    """
    left = [_MOST_VALUES]
    _check(value, where, _DEEPEST, left, finite)
    return value


def _check(value: Any, where: str, depth: int, left: list[int], finite: bool = True) -> None:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise AttnPatchError(f"{where}: nested too deeply, or more than {_MOST_VALUES:,} values.")
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        _refuse(abs(value) >= _LARGEST_INTEGER, value, where, "an integer that 64 bits hold")
    elif isinstance(value, float):
        _refuse(finite and not math.isfinite(value), value, where, "a finite number")
    elif isinstance(value, str):
        _refuse(len(value) > _LONGEST_TEXT, value, where, f"at most {_LONGEST_TEXT:,} characters")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _refuse(not isinstance(key, str), key, where, "text as a key")
            _check(item, f"{where}.{key}" if len(where) + len(key) < 200 else where, depth - 1, left, finite)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check(item, where, depth - 1, left, finite)
    else:
        _refuse(True, value, where, "text, numbers, lists and mappings")


def _refuse(wrong: bool, value: Any, where: str, wanted: str) -> None:
    if wrong:
        raise AttnPatchError(f"{where} is {brief(value)}; wanted {wanted}.")


def typed(hint: Any, value: Any, where: str) -> Any:
    """Build a value of a type from JSON data.

    Args:
        hint: ``int``, ``float``, ``str``, ``bool``, ``Any``, a dataclass, ``Literal``, ``X | None``, or ``tuple``,
            ``list``, ``dict`` and ``Mapping`` of these; lists stand for tuples, and lists of pairs for dictionaries.
        value: from JSON.
        where: for the message.

    Raises:
        AttnPatchError: another type; names the place, what was found and what was wanted.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or hint is Hashable:
        return plain(value, where)
    if origin in (Union, types.UnionType):
        return _union(inner, value, where)
    if origin is Literal:
        _refuse(value not in inner, value, where, f"one of {', '.join(map(repr, inner))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return fields_of(hint, value, where)
    if origin in (tuple, list, Sequence):
        return _list(origin, inner, value, where)
    if origin in (dict, Mapping) or origin is not None and issubclass(origin, Mapping):
        return _mapping(inner, value, where)
    return _scalar(hint, value, where)


def _union(inner: tuple[Any, ...], value: Any, where: str) -> Any:
    kinds = [kind for kind in inner if kind is not types.NoneType]
    if value is None and len(kinds) < len(inner):
        return None
    for kind in kinds[:-1]:
        try:
            return typed(kind, value, where)
        except AttnPatchError:
            continue  # another of the kinds may fit
    return typed(kinds[-1], value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float:
        _refuse(not number, value, where, "a number")
        _check(value, where, 1, [1])
        return float(value)
    names = {int: "a whole number", str: "text", bool: "true or false"}
    fits = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _refuse(not fits, value, where, names.get(hint, getattr(hint, "__name__", str(hint))))
    _check(value, where, 1, [1])
    return value


def _list(origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    _refuse(not isinstance(value, (list, tuple)), value, where, "a list")
    _refuse(len(value) > _MOST_VALUES, value, where, f"at most {_MOST_VALUES:,} values")
    fixed = origin is tuple and inner[-1] is not Ellipsis
    _refuse(fixed and len(value) != len(inner), value, where, f"a list of {len(inner)}")
    hints = inner if fixed else [inner[0]] * len(value)
    found = [typed(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(hints, value, strict=True))]
    return found if origin is list else tuple(found)


def _mapping(inner: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    is_pairs = isinstance(pairs, (list, tuple)) and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs)
    _refuse(not is_pairs, value, where, "a mapping")
    found = {}
    for key, item in pairs:
        made = typed(inner[0], key, f"{where}, a key")
        _refuse(not isinstance(made, (str, int, float, type(None))), made, f"{where}, a key", "text or a number")
        found[made] = typed(inner[1], item, f"{where}.{brief(made, 40)}")
    return found


def fields_of(kind: type[T], value: Any, where: str, *, whole: bool = False) -> T:
    """Build a dataclass from a mapping with exactly its fields.

    Args:
        kind: the dataclass.
        value: from JSON.
        where: for the message.
        whole: whether fields with a default are required, too.

    Raises:
        AttnPatchError: a field is missing, unknown or of another type, or the class refuses it.
    """
    _refuse(not isinstance(value, Mapping), value, where, "a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]  # checked
    unknown = [key for key in value if key not in fields]
    if unknown:
        raise AttnPatchError(f"{where}: no field {brief(unknown[0], 40)}; its fields are: {', '.join(fields)}.")
    free = dataclasses.MISSING
    open_ = {n for n, f in fields.items() if f.default is not free or f.default_factory is not free}
    absent = [name for name in fields if name not in value and (whole or name not in open_)]
    if absent:
        raise AttnPatchError(f"{where}: {absent[0]} is missing; its fields are: {', '.join(fields)}.")
    hints = get_type_hints(kind)
    try:
        return kind(**{name: typed(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    except AttnPatchError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise AttnPatchError(f"{where}: {brief(str(error), 200)}.") from error


def brief(value: Any, limit: int = 80) -> str:
    """Quote a value for an error message: on one line, shortened, without control characters."""
    if isinstance(value, str):
        text = " ".join(value[: 4 * limit].split())
        return ascii(text[:limit] + ("..." if len(value) > limit else "")) if not text.isprintable() else text[:limit]
    if isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, type(None))):
        return repr(value)
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def quoted(value: Any) -> str:
    """Quote a value like :func:`brief`, with text in quotes."""
    return repr(brief(value)) if isinstance(value, str) else brief(value)
