"""One Python file: its tree, who encloses what, and edits of its text by position."""

from __future__ import annotations

import ast
import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

PACKAGE = "transformers"
_PASS_ON = ("partial", "checkpoint")  # external functions whose keywords belong to the function that they are given


class InvalidMutation(ValueError):
    """A change that would not be consistent, or that changes nothing."""


@dataclass(frozen=True)
class Found:
    """A node and where it stands.

    Attributes:
        node: of the tree.
        scope: names of the enclosing classes and functions, outermost first.
        in_class: the innermost of them is a class.
        call: the call that a keyword belongs to.
        owner: what a string is a subscript of.
    """

    node: ast.AST
    scope: tuple[str, ...] = ()
    in_class: bool = False
    call: ast.Call | None = None
    owner: ast.expr | None = None

    @property
    def place(self) -> str:
        """The enclosing names with dots, "" at the top of the module."""
        return ".".join(self.scope)


@dataclass
class Source:
    """A file of the package.

    Attributes:
        name: its path below the package, with slashes.
        text: what it says.
    """

    name: str
    text: str
    _edits: list[tuple[int, int, str]] = field(default_factory=list)

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.splitlines(keepends=True)  # form feeds would count; the package has none in code

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self._lines:
            starts.append(starts[-1] + len(line))
        return starts

    def offset(self, line: int, column: int) -> int:
        """Return the index into the text of a position that `ast` gives, whose columns count bytes."""
        text = self._lines[line - 1]
        return self._starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node's text begins and ends."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def words(self, node: ast.AST) -> str:
        """Return a node's text."""
        start, end = self.span(node)
        return self.text[start:end]

    def replace(self, start: int, end: int, text: str) -> None:
        """Note an edit."""
        self._edits.append((start, end, text))

    @property
    def touched(self) -> bool:
        """Whether an edit is noted."""
        return bool(self._edits)

    def result(self) -> str:
        """Return the text with all edits, which must not overlap."""
        pieces, at = [], 0
        for start, end, text in sorted(set(self._edits)):
            if start < at:
                raise InvalidMutation(f"{self.where(start)}: two edits overlap")
            pieces += [self.text[at:start], text]
            at = end
        return "".join([*pieces, self.text[at:]])

    def where(self, offset: int) -> str:
        """Return file and line of an index into the text."""
        return f"{self.name}:{self.text.count(chr(10), 0, offset) + 1}"

    def nodes(self, pattern: str = "") -> Iterator[Found]:
        """Yield nodes with what encloses them, but nothing inside f-strings: Python 3.11 misplaces what is there.

        Args:
            pattern: of text; what stands on lines where it is not found is left out.
        """
        lines = [self.text.count("\n", 0, m.start()) + 1 for m in re.finditer(pattern, self.text)] if pattern else None
        stack = [Found(self.tree)]
        while stack:
            found = stack.pop()
            yield found
            if not isinstance(found.node, ast.JoinedStr):
                stack.extend(child for child in _below(found) if lines is None or _on(lines, child.node))

    @cached_property
    def external(self) -> frozenset[str]:
        """Names that this file imports from outside the package."""
        return frozenset(self._imported())

    def _imported(self) -> Iterator[str]:
        for node in (found.node for found in self.nodes(r"\bimport\b")):
            if isinstance(node, ast.Import):
                names = [(a.name, a.asname or a.name.split(".")[0]) for a in node.names]
                yield from (bound for name, bound in names if name.split(".")[0] != PACKAGE)
            elif isinstance(node, ast.ImportFrom) and not internal(node):
                yield from (a.asname or a.name for a in node.names)

    def foreign(self, expression: ast.expr) -> bool:
        """Whether an expression begins with a name that comes from outside the package."""
        text = re.match(r"\w+", self.words(expression))
        return text is not None and text.group() in self.external

    def foreign_call(self, call: ast.Call) -> bool:
        """Whether keywords of a call are names of a function from outside."""
        return self.foreign(call.func) and self.words(call.func).split(".")[-1] not in _PASS_ON


def _below(found: Found) -> Iterator[Found]:
    """Yield a node's children; decorators and bases stand outside the scope that a definition opens."""
    node = found.node
    opens = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    outside = [*node.decorator_list, *getattr(node, "bases", ()), *getattr(node, "keywords", ())] if opens else []
    body = node.body if isinstance(node, ast.ClassDef) else []
    for child in ast.iter_child_nodes(node):
        inner = opens and not any(child is other for other in outside)
        yield Found(
            child,
            (*found.scope, node.name) if inner else found.scope,
            any(child is statement for statement in body) if opens else found.in_class,
            node if isinstance(node, ast.Call) and isinstance(child, ast.keyword) else None,
            node.value if isinstance(node, ast.Subscript) and child is node.slice else None,
        )


def _on(lines: list[int], node: ast.AST) -> bool:
    """Whether a node stands on one of these lines, in order; what has no place of its own may."""
    first = min([getattr(node, "lineno", 0), *(d.lineno for d in getattr(node, "decorator_list", ()))])
    at = bisect.bisect_left(lines, first)
    return not first or (at < len(lines) and lines[at] <= node.end_lineno)


def internal(node: ast.ImportFrom) -> bool:
    """Whether an import is from the package itself."""
    return bool(node.level) or (node.module or "").split(".")[0] == PACKAGE
