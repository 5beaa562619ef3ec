"""Registers this package's model type with transformers as soon as that is imported, and not before.

Importing transformers takes seconds; ``attnpatch --help`` and reading a record do not need it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AWAITED = "transformers.models.auto.configuration_auto"  # the module with the table of model types


def register_on_arrival() -> None:
    """Register the model type now if transformers' table of model types is loaded, otherwise when it is imported."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from . import foreign

    foreign.register()


class _Finder(MetaPathFinder):
    """Finds nothing itself; wraps the loader of one module to learn when it has been loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AWAITED or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as the inner loader does, then registers the model type."""

    def __init__(self, inner: Loader):
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.inner  # which whoever reads its source asks for
        try:
            self.inner.exec_module(module)
            _register()
        except BaseException:  # such as Ctrl-C: the next import tries again
            sys.meta_path.insert(0, _Finder())
            raise
