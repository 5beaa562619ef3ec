"""One name becomes another, in code and in the strings that are that name."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .source import Found, InvalidMutation, Source, internal

ROLES = ("name", "parameter", "keyword", "attribute", "field", "method", "import", "string")
_DOTTED = re.compile(r"[\w*{}]+(\.[\w*{}]+)+")  # a path of modules, as in tp plans: layers.*.self_attn.q_proj


@dataclass(frozen=True)
class Rename:
    """Old name to new name.

    What is imported from outside the package, attributes of that, and keywords of calls of that keep their names.
    Docstrings and comments keep theirs, too.

    Attributes:
        old: the identifier.
        new: the identifier in its place.
        roles: which of `ROLES` are renamed. A field is a name in the body of a class; a method is a function there.
        files: pattern that must be found in the file's path.
        inside: pattern that must be found in the enclosing names ("LlamaAttention.forward").
        receiver: pattern that must be found before the dot of an attribute, or before the brackets around a string.
        callee: pattern that must be found in the function whose keyword it is.
    """

    old: str
    new: str
    roles: tuple[str, ...] = ROLES
    files: str = ""
    inside: str = ""
    receiver: str = ""
    callee: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.roles) - set(ROLES)
        if unknown or not (self.old.isidentifier() and self.new.isidentifier()):
            raise InvalidMutation(
                f"{self.old}={self.new}: names and roles of {ROLES} are wanted; found {unknown or ''}"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """What a refusal may name."""
        return (self.old, self.new)

    def concerns(self, name: str, text: str) -> bool:
        """Whether a file may hold the name: quick, without reading its code."""
        return re.search(self.files, name) is not None and re.search(_near(self.old), text) is not None

    def edit(self, source: Source) -> None:
        """Note the edits of one file.

        Raises:
            InvalidMutation: the new name is there already, where it would be mixed up with the old one.
        """
        sites = list(self._sites(source))
        if self.new in source.text:
            self._no_collision(source, sites)
        for _, _, start in sites:
            assert source.text[start : start + len(self.old)] == self.old, source.where(start)
            source.replace(start, start + len(self.old), self.new)

    def _sites(self, source: Source) -> Iterator[tuple[str, Found, int]]:
        """Yield role, node and beginning of each place where the old name becomes the new one."""
        for found in source.nodes(_near(self.old)):
            for role, start in _places(source, found, self.old):
                if role in self.roles and self._wanted(source, found, role, start):
                    yield role, found, start

    def _wanted(self, source: Source, found: Found, role: str, start: int) -> bool:
        if self.inside and role != "import" and not re.search(self.inside, found.place):
            return False
        node = found.node
        if isinstance(node, ast.JoinedStr) and role == "attribute":
            before = re.search(r"[\w.()\[\]]*$", source.text[:start].removesuffix("."))
            return before is not None and _has(self.receiver, before.group())
        if role == "name":
            return self.old not in source.external
        if role == "keyword" and found.call is not None:
            return not source.foreign_call(found.call) and _has(self.callee, source.words(found.call.func))
        if role == "attribute" and isinstance(node, ast.Attribute):
            return not source.foreign(node.value) and _has(self.receiver, source.words(node.value))
        if role == "string" and self.receiver:
            return found.owner is not None and _has(self.receiver, source.words(found.owner))
        return True

    def _no_collision(self, source: Source, sites: list[tuple[str, Found, int]]) -> None:
        groups: dict[tuple[str, object], int] = {}
        for role, found, start in sites:
            key = _group(source, role, found)
            if key is not None:
                groups.setdefault(key, start)
        for found in source.nodes(_near(self.new)):
            for role, _ in _places(source, found, self.new):
                key = _group(source, role, found)
                if key in groups:
                    raise InvalidMutation(
                        f"{source.where(groups[key])}: {self.old} cannot become {self.new}: another {role} there"
                    )


def _near(name: str) -> str:
    """A pattern of where a name may be: `{prefix}_name` in an f-string is a name made of parts."""
    return rf"(?<![^\W_]){name}\b"


def _has(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def _group(source: Source, role: str, found: Found) -> tuple[str, object] | None:
    """Places in which two names of one role would be one: a function, a call, a class, an object."""
    if role in ("name", "parameter"):
        return "name", found.scope
    if role == "keyword":
        return "keyword", found.call
    if role in ("field", "method"):
        return "field", found.scope
    if role == "attribute" and isinstance(found.node, ast.Attribute):
        return "attribute", (found.scope[:1], source.words(found.node.value))
    return None


def _places(source: Source, found: Found, name: str) -> Iterator[tuple[str, int]]:
    """Yield the roles in which a node has a name, and where the name begins."""
    node = found.node
    if isinstance(node, ast.Name) and node.id == name:
        yield ("field" if found.in_class else "name"), source.span(node)[0]
    elif isinstance(node, ast.arg) and node.arg == name:
        yield "parameter", source.span(node)[0]
    elif isinstance(node, ast.keyword) and node.arg == name:
        yield "keyword", source.span(node)[0]
    elif isinstance(node, ast.Attribute) and node.attr == name:
        yield "attribute", source.span(node)[1] - len(name)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
        start = source.span(node)[0]
        word = re.compile(r"(?:async\s+)?(?:def|class)\s+").match(source.text, start)
        assert word is not None
        yield ("method" if found.in_class else "name"), word.end()
    elif isinstance(node, (ast.Global, ast.Nonlocal)) and name in node.names:
        start, end = source.span(node)
        yield from (("name", start + m.start()) for m in re.finditer(rf"\b{name}\b", source.text[start:end]))
    elif isinstance(node, ast.ImportFrom) and internal(node):
        yield from (("import", at) for alias in node.names for at in _alias(source, alias, name))
    elif isinstance(node, ast.ExceptHandler) and node.name == name:
        start = source.span(node)[0]
        yield "name", source.text.index(f" as {name}", start) + 4
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from (("string", at) for at in _in_string(source, node, name))
    elif isinstance(node, ast.JoinedStr):
        yield from _in_fstring(source, node, name)


def _alias(source: Source, alias: ast.alias, name: str) -> Iterator[int]:
    start, end = source.span(alias)
    if alias.name == name:
        yield start
    if alias.asname == name:
        yield end - len(name)


def _in_string(source: Source, node: ast.Constant, name: str) -> Iterator[int]:
    """Where a string is the name, or a dotted path that has it as a part."""
    if node.value != name and not (_DOTTED.fullmatch(node.value) and name in node.value.split(".")):
        return
    start, end = source.span(node)
    yield from (start + m.start() for m in re.finditer(rf"(?<!\w){name}(?!\w)", source.text[start:end]))


def _in_fstring(source: Source, node: ast.JoinedStr, name: str) -> Iterator[tuple[str, int]]:
    """The name in the braces of an f-string, in roles told by what stands beside it, and behind them as a part."""
    start, end = source.span(node)
    text, depth, at = source.text[start:end], 0, 0
    braces = []
    while at < len(text):
        if depth == 0 and text[at : at + 2] in ("{{", "}}"):
            at += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        braces.append((at, depth > 0))
        at += 1
    inside = defaultdict(bool, braces)
    for match in re.finditer(_near(name), text):
        if not inside[match.start()]:
            made = text[: match.start()].removesuffix("_")[-1] in "}." and text[match.end()] in "{.'\""
            yield from [("string", start + match.start())] if made else []
            continue
        if not re.match(r"\W", text[match.start() - 1]):
            continue
        before, after = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:2]
        called = after[:1] == "=" and after != "==" and before in "(,"
        role = "attribute" if before == "." else "string" if before in "'\"" else "keyword" if called else "name"
        yield role, start + match.start()
