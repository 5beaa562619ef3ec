"""A module goes to another place, with nothing left where it was."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from .source import PACKAGE, InvalidMutation, Source


@dataclass(frozen=True)
class Move:
    """The module `old` becomes `new`; both are dotted paths below the package ("cache_utils", "caching.store").

    Every import follows; there is no alias. Of a package only a module in it can be moved.
    """

    old: str
    new: str

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return (self.old.split(".")[-1], self.new.split(".")[-1])

    @property
    def file(self) -> str:
        """Where the module was."""
        return self.old.replace(".", "/") + ".py"

    @property
    def place(self) -> str:
        """Where the module goes."""
        return self.new.replace(".", "/") + ".py"

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may import the module, or is it."""
        return self.old.split(".")[-1] in text or name == self.file

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        for found in source.nodes(rf"\b{self.old.split('.')[-1]}\b" if source.name != self.file else ""):
            node = found.node
            if isinstance(node, ast.ImportFrom):
                self._import_from(source, node)
            elif isinstance(node, ast.Import):
                self._import(source, node)
            elif isinstance(node, ast.Constant) and node.value in self._strings(source):
                start, end = source.span(node)
                text = source.text[start:end]
                source.replace(start, end, text.replace(self.old, self.new))

    def _strings(self, source: Source) -> tuple[str, ...]:
        """Strings that mean the module: its absolute name, and keys of the lazy imports of the package itself."""
        absolute = f"{PACKAGE}.{self.old}"
        return (absolute, self.old) if source.name == "__init__.py" else (absolute, f".{self.old}")

    def _import_from(self, source: Source, node: ast.ImportFrom) -> None:
        module = absolute_module(source.name, node)
        old, new = f"{PACKAGE}.{self.old}", f"{PACKAGE}.{self.new}"
        start, end = source.span(node)
        whole = re.match(r"from\s+([.\w\s]+?)\s+import\b", source.text[start:end])
        assert whole is not None
        begin, stop = start + whole.start(1), start + whole.end(1)
        if module == old:
            source.replace(begin, stop, new)
            return
        if f"{module}.{old.split('.')[-1]}" == old and any(a.name == old.split(".")[-1] for a in node.names):
            source.replace(start, end, self._apart(source, node, module))
        elif source.name == self.file and node.level:  # its own relative imports
            source.replace(begin, stop, module)

    def _apart(self, source: Source, node: ast.ImportFrom, module: str) -> str:
        """`from .integrations import a, moved` in two statements on one line."""
        name = self.old.split(".")[-1]
        parent, _, last = f"{PACKAGE}.{self.new}".rpartition(".")
        mine = next(a for a in node.names if a.name == name)
        others = [source.words(a) for a in node.names if a is not mine]
        own = f"from {parent} import {last} as {mine.asname or name}"
        return own + (f"; from {module} import {', '.join(others)}" if others else "")

    def _import(self, source: Source, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name == f"{PACKAGE}.{self.old}":
                if alias.asname is None:
                    raise InvalidMutation(
                        f"{source.name}:{node.lineno}: `import {alias.name}` binds the package; not followed"
                    )
                start, _ = source.span(alias)
                source.replace(start, start + len(alias.name), f"{PACKAGE}.{self.new}")


def absolute_module(name: str, node: ast.ImportFrom) -> str:
    """The module that an import names.

    Args:
        name: the importing file's path below the package.
        node: the statement.
    """
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *name.split("/")[:-1]]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])
