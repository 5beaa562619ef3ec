"""Reads a recipe's YAML into dataclasses; unknown keys are errors."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hf_attnpatch.errors import AttnPatchError
from hf_attnpatch.schema import LARGEST_YAML, brief, from_yaml, quoted, text_of

T = TypeVar("T")


class SettingsError(ValueError):
    """A recipe's configuration cannot be used; the message says which key and what to write instead."""


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a YAML file and applies overrides such as `train.steps=10`.

    Args:
        path: the YAML file; its top level is a mapping of sections.
        overrides: `section.key=value` strings; the value is parsed as YAML.

    Returns:
        The sections as plain dictionaries.

    Raises:
        SettingsError: the file is missing or no mapping, or an override does not read `a.b=value`.
    """
    if not Path(path).is_file():
        raise SettingsError(f"{path}: no such configuration; the ones that ship are in recipes/configs/.")
    try:
        text = text_of(Path(path), LARGEST_YAML)
    except AttnPatchError as error:
        raise SettingsError(f"{error} Write it as YAML.") from error
    values = _yaml(text, str(path))
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping of sections, found {type(values).__name__}.")
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise SettingsError(f"--set {override}: expected section.key=value.")
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SettingsError(f"--set {override}: {parent} is {quoted(target)}, no section; set it as a whole.")
        target[leaf] = _yaml(value, f"--set {override}")
    return values


def _yaml(text: str, where: str) -> Any:
    try:
        return from_yaml(text, where, aliases=True)
    except AttnPatchError as error:
        raise SettingsError(str(error)) from error


def at_least(least: int, section: str, **values: int | None) -> None:
    """Refuses numbers that are too small; None is a number that was left open.

    Raises:
        SettingsError: names the first of them.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise SettingsError(f"{section}.{name}: {value}; wanted {least} or more.")


def build(kind: type[T], values: dict[str, Any] | None, section: str) -> T:
    """Makes the dataclass `kind` from one section of a configuration.

    Args:
        kind: a dataclass; its fields are the keys that may occur.
        values: the section.
        section: its name, for the message.

    Returns:
        An instance of `kind`.

    Raises:
        SettingsError: a key is unknown or a required one is missing, or a value is no number or not one of the choices.
    """
    given = check_keys(kind, values, section)
    types = get_type_hints(kind)
    return kind(**{name: _value(types[name], value, f"{section}.{name}") for name, value in given.items()})


def check_keys(kind: type[Any], values: dict[str, Any] | None, section: str) -> dict[str, Any]:
    """Returns `values`, whose keys are fields of the dataclass `kind`, the required ones among them.

    Raises:
        SettingsError: a key is unknown or a required one is missing, or `values` is no mapping.
    """
    if not isinstance(values or {}, dict):
        raise SettingsError(f"{section}: expected a mapping, found {quoted(values)}.")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    given = dict(values or {})
    unknown = sorted(brief(key, 40) for key in set(given) - set(fields))
    if unknown:
        raise SettingsError(f"{section}: unknown {', '.join(unknown)}; choose from {', '.join(sorted(fields))}.")
    missing = dataclasses.MISSING
    required = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
    absent = [name for name in required if name not in given]
    if absent:
        raise SettingsError(f"{section}: {', '.join(absent)} must be given.")
    return given


def _value(kind: Any, value: Any, name: str) -> Any:
    inner = [each for each in get_args(kind) if each is not type(None)]
    if type(None) in get_args(kind) and len(inner) == 1:  # "int | None"
        return None if value is None else _value(inner[0], value, name)
    if kind is float:
        try:
            number = float(value)  # YAML reads 2e-3 as a string
        except (OverflowError, TypeError, ValueError) as error:
            raise SettingsError(f"{name}: expected a number, found {quoted(value)}.") from error
        if not math.isfinite(number):
            raise SettingsError(f"{name}: expected a finite number, found {number}.")
        return number
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise SettingsError(
            f"{name}: {quoted(value)} does not exist; choose from {', '.join(map(repr, get_args(kind)))}."
        )
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise SettingsError(f"{name}: expected a whole number, found {quoted(value)}.")
    return tuple(value) if isinstance(value, list) else value


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line every recipe shares: `--config FILE --set section.key=value --resume`."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--config", required=True, help="a YAML file, see recipes/configs/")
    arguments.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    arguments.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in train.output")
    return arguments


def clearly(main: Callable[[], None], *errors: type[Exception]) -> None:
    """Runs a recipe; an error that its user can fix is one line and exit code 1, anything else keeps its traceback."""
    try:
        main()
    except errors as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
