"""The installed packages, whether they were tested, and which extras can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from .. import tested
from .expected import EXTRAS
from .text import clean
from .trial import CRASHES, FAILS

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub")
# Lowest and newest release that this package's tests passed on.
TESTED: Mapping[str, tuple[str, str]] = {"transformers": (tested.LOWEST, tested.NEWEST), "torch": ("2.13.0", "2.13.0")}

INSTALLED, ABSENT = "works", "not installed"


@dataclass(frozen=True)
class Package:
    """An installed package.

    Attributes:
        name: of the distribution.
        version: None where it is not installed.
        tested: lowest and newest release that was tested; None where nothing is recorded.
    """

    name: str
    version: str | None
    tested: tuple[str, str] | None = None

    @property
    def standing(self) -> str:
        """``tested``, ``newer than tested``, ``older than tested``, ``not installed``; empty if unknown."""
        if self.version is None:
            return ABSENT
        if self.tested is None:
            return ""
        try:
            mine, (low, high) = Version(self.version), map(Version, self.tested)
        except InvalidVersion:
            return ""
        mine = Version(mine.base_version) if mine.local else mine  # 2.13.0+cpu is 2.13.0
        return "tested" if low <= mine <= high else "newer than tested" if mine > high else "older than tested"


@dataclass(frozen=True)
class Extra:
    """An extra of this package.

    Attributes:
        name: as in ``pip install 'hf_attnpatch[name]'``.
        outcome: ``works``, ``not installed`` or ``fails``.
        note: what is missing, or why it fails; empty where it works.
    """

    name: str
    outcome: str
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether this is not a fault: a missing extra is none."""
        return self.outcome != FAILS


def packages() -> tuple[Package, ...]:
    """Return this package, Python and their dependencies, in the order of a report."""
    from .. import __version__

    own = (Package("hf_attnpatch", __version__), Package("python", platform.python_version()))
    return (*own, *(Package(name, _version(name), TESTED.get(name)) for name in PACKAGES))


def extras() -> tuple[Extra, ...]:
    """Import the packages of each extra, and compare them with the required releases."""
    return tuple(_extra(name, modules) for name, modules in EXTRAS.items())


def _extra(name: str, modules: Mapping[str, str]) -> Extra:
    absent = [package for package in modules if _version(package) is None]
    if absent:
        return Extra(name, ABSENT, f"needs {', '.join(absent)}: pip install 'hf_attnpatch[{name}]'")
    old = [f"{r} is wanted, {_version(r.name)} is installed" for r in _wanted(name) if _unfit(r)]
    if old:
        return Extra(name, FAILS, "; ".join(old))
    for module in modules.values():
        try:
            importlib.import_module(module)
        except CRASHES as error:
            return Extra(name, FAILS, f"import {module}: {type(error).__name__}: {clean(str(error))}")
    return Extra(name, INSTALLED)


def _wanted(extra: str) -> list[Requirement]:
    """Return the requirements of an extra here; none if this package is not installed but run from a folder."""
    try:
        lines = importlib.metadata.requires("hf_attnpatch") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [
        r for r in found if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def _unfit(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and not requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
