"""Finds classes and functions that transformers does not export at its top level, wherever a release keeps them."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

from ..errors import UpstreamChanged


@functools.cache
def find(name: str, home: str, purpose: str) -> Any:
    """Return a class, function or table of transformers.

    Args:
        name: its name.
        home: module below ``transformers`` that defines it in known releases, such as ``cache_utils``.
        purpose: what needs it, as the end of a sentence in the error.

    Raises:
        UpstreamChanged: no module of the installed release defines it.
    """
    known = _module(f"transformers.{home}")
    if known is not None and hasattr(known, name):
        return getattr(known, name)
    loaded = [
        m for key, m in list(sys.modules.items()) if key.startswith("transformers.") and isinstance(m, ModuleType)
    ]
    for module in loaded:
        found = vars(module).get(name)
        if found is not None and getattr(found, "__module__", module.__name__) == module.__name__:
            return found
    for module_name in _defining(name):
        module_or_none = _module(module_name)
        if module_or_none is not None and hasattr(module_or_none, name):
            return getattr(module_or_none, name)
    raise changed(f"no {name} (transformers.{home} had it in earlier releases)", purpose)


def auto_classes() -> ModuleType:
    """Return the module of transformers' Auto classes and their tables."""
    return sys.modules[find("AutoModelForCausalLM", "models.auto.modeling_auto", "loading checkpoints").__module__]


def changed(what: str, purpose: str) -> UpstreamChanged:
    """Build the error for something that the installed transformers lacks, or defines differently.

    Args:
        what: what was or was not found, as the object of "has".
        purpose: what needs it, as the object of "which ... needs".
    """
    return UpstreamChanged(
        f"transformers {transformers.__version__} has {what}, which {purpose} needs. This release was changed in a way "
        "that this package does not follow: `attnpatch doctor` says what works with it; an earlier release does."
    )


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _defining(name: str) -> list[str]:
    """Return the names of the modules outside ``models`` whose source defines ``name`` at top level."""
    root = Path(str(transformers.__file__)).parent
    pattern = re.compile(rf"^(?:(?:def|class) {re.escape(name)}\b|{re.escape(name)}\s*[:=])", re.MULTILINE)
    files = [path for path in sorted(root.rglob("*.py")) if path.relative_to(root).parts[0] != "models"]
    files += sorted((root / "models" / "auto").glob("*.py"))
    matching = [path for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    return [".".join(("transformers", *path.relative_to(root).with_suffix("").parts)) for path in matching]
