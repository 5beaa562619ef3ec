"""Signatures and results take another shape: an argument in front, a keyword for a position, a type for a tuple."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection
from dataclasses import dataclass

from .source import PACKAGE, Source

TYPES = "rehearsed_types"  # the module that a copy gets for new types


@dataclass(frozen=True)
class AddArgument:
    """An argument in front of all others, which every caller passes as None.

    Attributes:
        definition: pattern of the functions: "^create_causal_mask$", or "Attention[.]forward$" for methods.
        name: of the argument.
        calls: pattern of what is called ("^create_causal_mask$"). An attribute that holds an instance of a class whose
            ``forward`` matches is found by itself.
        files: pattern that must be found in the file's path.
    """

    definition: str
    name: str
    calls: str = "(?!)"
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name: the argument, or the functions."""
        return (self.name, *re.findall(r"[A-Za-z_]{4,}", self.definition))

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        held = holders(source, self.definition)
        for found in source.nodes():
            node = found.node
            if isinstance(node, ast.FunctionDef) and re.search(self.definition, ".".join((*found.scope, node.name))):
                self._in_signature(source, node, found.in_class)
            elif isinstance(node, ast.Call) and self._calls(source, node, held):
                at = source.text.index("(", source.span(node.func)[1]) + 1
                source.replace(at, at, "None, " if node.args or node.keywords else "None")

    def _calls(self, source: Source, node: ast.Call, held: Collection[str]) -> bool:
        called = source.words(node.func)
        if source.foreign(node.func):
            return False
        return called in held or re.search(self.calls, called) is not None

    def _in_signature(self, source: Source, node: ast.FunctionDef, method: bool) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args]
        if method and arguments and arguments[0].arg in ("self", "cls"):
            at = source.span(arguments[0])[1]
            source.replace(at, at, f", {self.name}")
            return
        start = source.text.index("(", re.compile(r"def\s+\w+").match(source.text, source.span(node)[0]).end()) + 1
        source.replace(start, start, f"{self.name}, " if arguments else self.name)


@dataclass(frozen=True)
class PassByKeyword:
    """What was passed by position is passed by keyword.

    Attributes:
        calls: pattern of what is called.
        index: position of the first argument that gets its keyword; those behind it get theirs, too.
        names: keywords, from that position on.
        files: pattern that must be found in the file's path.
    """

    calls: str
    index: int
    names: tuple[str, ...]
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return self.names

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        return re.search(self.files, name) is not None and re.search(_loose(self.calls), text) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        for found in source.nodes(_loose(self.calls)):
            node = found.node
            if not (isinstance(node, ast.Call) and re.search(self.calls, source.words(node.func))):
                continue
            late = node.args[self.index :]
            if late and len(late) <= len(self.names) and not any(isinstance(a, ast.Starred) for a in node.args):
                for argument, name in zip(late, self.names, strict=False):
                    at = source.span(argument)[0]
                    source.replace(at, at, f"{name}=")


@dataclass(frozen=True)
class WrapReturn:
    """A function returns a type of its own in the place of a tuple.

    Attributes:
        definition: pattern of the functions, "RotaryEmbedding[.]forward$".
        type: name of the new class.
        fields: of it, one for each part of the tuple; tuples of another length stay.
        unpack: pattern of expressions that are taken apart; "" keeps the type a NamedTuple, which needs no help.
        files: pattern that must be found in the file's path.
    """

    definition: str
    type: str
    fields: tuple[str, ...]
    unpack: str = ""
    files: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return (self.type, *self.fields)

    @property
    def module(self) -> str:
        """The source of the module with the new class."""
        fields = "\n".join(f"    {name}: Any" for name in self.fields)
        if not self.unpack:
            return f"from typing import Any, NamedTuple\n\n\nclass {self.type}(NamedTuple):\n{fields}\n"
        parts = ", ".join(f"self.{name}" for name in self.fields)
        return (
            "from dataclasses import dataclass\nfrom typing import Any\n\n\n"
            f"@dataclass\nclass {self.type}:\n{fields}\n\n    def parts(self):\n        return ({parts})\n"
        )

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may have something to change."""
        either = f"{_loose(self.definition.split('[.]')[0])}|{_loose(self.unpack or '(?!)')}"
        return re.search(self.files, name) is not None and re.search(either, text) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file."""
        wrapped = False
        for found in source.nodes(rf"\breturn\b|{_loose(self.unpack or '(?!)')}"):
            node = found.node
            if isinstance(node, ast.Return) and re.search(self.definition, found.place):
                wrapped |= self._wrap(source, node)
            elif self.unpack and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                if len(node.targets[0].elts) == len(self.fields) and re.search(self.unpack, source.words(node.value)):
                    at = source.span(node.value)[1]
                    source.replace(at, at, ".parts()")
        if wrapped:
            at = first_statement(source)
            source.replace(at, at, f"from {PACKAGE}.{TYPES} import {self.type}\n")

    def _wrap(self, source: Source, node: ast.Return) -> bool:
        value = node.value
        if not (isinstance(value, ast.Tuple) and len(value.elts) == len(self.fields)):
            return False
        start, end = source.span(value)
        inner = ", ".join(source.words(part) for part in value.elts)
        source.replace(start, end, f"{self.type}({inner})")
        return True


def holders(source: Source, definition: str) -> dict[str, str]:
    """Return `self.x` -> class, where a class whose forward matches is made and kept, by its name or by another."""
    assigned = [node for node in ast.walk(source.tree) if isinstance(node, ast.Assign)]
    names = {}
    for node in assigned:
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, (ast.IfExp, ast.Dict)):  # one of several
            kinds = [n.id for n in ast.walk(node.value) if isinstance(n, ast.Name) and _forwards(n.id, definition)]
            if kinds:
                names[node.targets[0].id] = kinds[0]
    found = {}
    for node in assigned:
        if isinstance(node.value, ast.Call):
            made = source.words(node.value.func).split("[")[0]
            if made in names or _forwards(made, definition):
                found[source.words(node.targets[0])] = names.get(made, made)
    return found


def _forwards(kind: str, definition: str) -> bool:
    return kind[:1].isupper() and re.search(definition, f"{kind}.forward") is not None


def _loose(pattern: str) -> str:
    """A pattern of a whole expression, as one of a line that may hold it."""
    return pattern.replace("^", "").replace("$", "")


def first_statement(source: Source) -> int:
    """Where the first statement begins that is neither the docstring nor an import from the future."""
    for node in source.tree.body:
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not future and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return source.offset(min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]), 0)
    raise AssertionError("a module that returns something has statements")
