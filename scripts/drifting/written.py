"""The same forward, written or called otherwise: decorated, with keywords only, by position, in other words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .shape import TYPES, first_statement, holders
from .source import PACKAGE, Source


@dataclass(frozen=True)
class Decorate:
    """Functions get a decorator, outside of those that they have.

    Attributes:
        definition: pattern of the functions, "Attention[.]forward$".
        name: of the decorator.
        module: source that defines it.
        files: pattern that must be found in the file's path.
    """

    definition: str
    name: str
    module: str
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name: the decorator, or what it stands around."""
        return (self.name, "forward")

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        for found in source.nodes(r"\bdef\b"):
            node = found.node
            if isinstance(node, ast.FunctionDef) and re.search(self.definition, ".".join((*found.scope, node.name))):
                line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                at = source.offset(line, 0)
                source.replace(at, at, f"{' ' * node.col_offset}@{self.name}\n")
        if source.touched:
            at = first_statement(source)
            source.replace(at, at, f"from {PACKAGE}.{TYPES} import {self.name}\n")


@dataclass(frozen=True)
class KeywordOnly:
    """Arguments of a module's forward behind the first can be passed by keyword only.

    Attributes:
        definition: pattern of the methods, "Attention[.]forward$".
        files: pattern that must be found in the file's path.
    """

    definition: str
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name: the functions."""
        return tuple(re.findall(r"[A-Za-z_]{4,}", self.definition))

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        held, names = holders(source, self.definition), dict(self._signatures(source))
        for found in source.nodes():
            node = found.node
            if not isinstance(node, ast.Call) or held.get(source.words(node.func)) not in names:
                continue
            for argument, name in list(zip(node.args, names[held[source.words(node.func)]], strict=False))[1:]:
                at = source.span(argument)[0]
                source.replace(at, at, f"{name}=")

    def _signatures(self, source: Source) -> Iterator[tuple[str, list[str]]]:
        """Note the star in each signature, and yield the class with the names of its arguments."""
        for found in source.nodes(r"\bdef\b"):
            node = found.node
            if not (isinstance(node, ast.FunctionDef) and found.in_class and not node.args.vararg):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args][1:]
            if re.search(self.definition, ".".join((*found.scope, node.name))) and len(arguments) > 1:
                at = source.span(arguments[1])[0]
                source.replace(at, at, "" if node.args.kwonlyargs else "*, ")
                yield found.scope[-1], [a.arg for a in arguments]


@dataclass(frozen=True)
class PassByPosition:
    """The first argument of a module's forward is passed by position where it was passed by keyword.

    Attributes:
        definition: pattern of the methods, "Attention[.]forward$".
        name: of the argument.
        files: pattern that must be found in the file's path.
    """

    definition: str
    name: str
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return (self.name,)

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        held = holders(source, self.definition)
        for found in source.nodes():
            node = found.node
            if isinstance(node, ast.Call) and source.words(node.func) in held and node.keywords and not node.args:
                first = node.keywords[0]
                if first.arg == self.name:
                    source.replace(*source.span(first), source.words(first.value))


@dataclass(frozen=True)
class Rewrite:
    """Some text becomes another.

    Attributes:
        pattern: of what is there.
        new: in its place, with groups of the pattern.
        names: that a refusal may name.
        module: source of what the new text imports from the copy's own module; "" where it imports nothing.
        imports: what that is.
        files: pattern that must be found in the file's path.
    """

    pattern: str
    new: str
    names: tuple[str, ...]
    module: str = ""
    imports: str = ""
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return self.names

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None and re.search(self.pattern, text) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        for match in re.finditer(self.pattern, source.text):
            source.replace(*match.span(), match.expand(self.new))
        if self.imports and source.touched:
            at = first_statement(source)
            source.replace(at, at, f"from {PACKAGE}.{TYPES} import {self.imports}\n")
