"""Mutants of a source file: mutmut's operators and a few of our own, each mutant as the whole text of the file.

mutmut itself leaves out decorated functions (properties, ``no_grad``), defaults and constants, and wraps every other
function; half of what guards models here stands in such places. So its operators are used, and files are served whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import libcst as cst
from libcst import matchers as m
from libcst.metadata import CodeRange, MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation import mutators
from mutmut.mutation.file_mutation import deep_replace

_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_BLOCKS = (cst.If, cst.For, cst.While, cst.With, cst.FunctionDef, cst.ClassDef, cst.Try, cst.Match)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        function: dotted name of what it stands in; empty at the top of the file.
        lines: first and last line of the statement, from 1.
        operator: name of the change.
        old: the changed lines, stripped and joined.
        new: the same after the change.
        source: the whole file after the change.
        occurrence: which one it is of the same changes in this function, from 0.
    """

    function: str
    lines: tuple[int, int]
    operator: str
    old: str
    new: str
    source: str
    occurrence: int = 0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is known by while lines above it come and go."""
        return self.function, self.old, self.new, self.occurrence


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file, in its order; changes that no test could see (annotations, docstrings) are left out."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    collector = _Collector()
    wrapper.visit(collector)
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    for place, operator, node, new, span in collector.found:
        text = _replaced(wrapper.module, source, node, new, span)
        old_lines, new_lines = _changed(source, text)
        key = place[0], old_lines, new_lines
        if old_lines != new_lines and _compiles(text):
            found.append(Mutant(*place, operator, old_lines, new_lines, text, seen[key]))
            seen[key] += 1
    return found


def sample(found: list[Mutant], count: int, seed: str) -> list[Mutant]:
    """So many of them, drawn by a hash of each, so that one drawn stays drawn when its neighbours change."""
    drawn = sorted(found, key=lambda one: hashlib.sha256(f"{seed}{one.key}".encode()).digest())[:count]
    return [one for one in found if one in drawn] if count < len(found) else found


def _replaced(module: cst.Module, source: str, node: cst.CSTNode, new: cst.CSTNode, span: CodeRange) -> str:
    """The file with one node changed; an expression is put into the text, which takes a tenth of the time."""
    if not isinstance(node, cst.BaseExpression):
        return deep_replace(module, node, new).code
    lines = source.splitlines(keepends=True)
    before = "".join(lines[: span.start.line - 1]) + lines[span.start.line - 1][: span.start.column]
    after = lines[span.end.line - 1][span.end.column :] + "".join(lines[span.end.line :])
    return before + module.code_for_node(new) + after


def _changed(before: str, after: str) -> tuple[str, str]:
    """The lines in which two texts differ, stripped and joined."""
    old, new = before.splitlines(), after.splitlines()
    same = len(os.path.commonprefix([old, new]))
    old, new = old[same:], new[same:]
    tail = len(os.path.commonprefix([old[::-1], new[::-1]]))
    return " ".join(map(str.strip, old[: len(old) - tail])), " ".join(map(str.strip, new[: len(new) - tail]))


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def _less(node: cst.Integer) -> Iterator[cst.CSTNode]:
    yield node.with_changes(value=str(node.evaluated_value - 1)) if node.evaluated_value else cst.parse_expression("-1")


def _string(node: cst.SimpleString) -> Iterator[cst.CSTNode]:
    yield from list(mutators.operator_string(node))[:1]  # upper and lower case say nothing that this one does not


def _without_argument(node: cst.Call) -> Iterator[cst.CSTNode]:
    """Drop one that may be absent: by keyword, or the last one; without another it mostly is a TypeError."""
    for i, arg in enumerate(node.args):
        if m.matches(arg.keyword, m.Name("strict")):
            continue
        if arg.keyword or (i == len(node.args) - 1 and not arg.star):
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


def _twin(node: cst.Call) -> Iterator[cst.CSTNode]:
    if isinstance(node.func, cst.Name) and node.func.value in _TWINS:
        yield node.with_changes(func=cst.Name(_TWINS[node.func.value]))


def _negated(node: cst.If | cst.While | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Turn a condition round; comparisons have operators of their own."""
    if not isinstance(node.test, (cst.Comparison, cst.BooleanOperation, cst.UnaryOperation)):
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), _in_parentheses(node.test)))


def _decided(node: cst.If | cst.CompIf) -> Iterator[cst.CSTNode]:
    """Take a guard away: the branch never or always; what mutmut does for ternaries alone."""
    yield node.with_changes(test=cst.Name("False"))
    yield node.with_changes(test=cst.Name("True"))


def _in_parentheses(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def _dropped(node: cst.SimpleStatementLine) -> Iterator[cst.CSTNode]:
    """Leave a call or an error out, of which nothing is kept."""
    if m.matches(node, m.SimpleStatementLine(body=[m.Expr(m.Call()) | m.Raise() | m.AugAssign()])):
        yield node.with_changes(body=[cst.Pass()])


OPERATORS = (
    ("number + 1", cst.BaseNumber, mutators.operator_number),
    ("number - 1", cst.Integer, _less),
    ("string", cst.SimpleString, _string),
    ("name", cst.Name, mutators.operator_name),
    ("assign only", cst.AugAssign, mutators.operator_augmented_assignment),
    ("no unary", cst.UnaryOperation, mutators.operator_remove_unary_ops),
    ("no argument", cst.Call, _without_argument),
    ("dict key", cst.Call, mutators.operator_dict_arguments),
    ("string method", cst.Call, mutators.operator_symmetric_string_methods_swap),
    ("split", cst.Call, mutators.operator_unsymmetrical_string_methods_swap),
    ("min max any all", cst.Call, _twin),
    ("keyword", cst.CSTNode, mutators.operator_keywords),
    ("operator", cst.CSTNode, mutators.operator_swap_op),
    ("match", cst.Match, mutators.operator_match),
    ("ternary", cst.IfExp, mutators.operator_if_exp),
    ("not", (cst.If, cst.While, cst.CompIf), _negated),
    ("guard", (cst.If, cst.CompIf), _decided),
    ("dropped", cst.SimpleStatementLine, _dropped),
)


class _Collector(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, WhitespaceInclusivePositionProvider)

    def __init__(self) -> None:
        self.found: list[tuple[tuple[str, tuple[int, int]], str, cst.CSTNode, cst.CSTNode, CodeRange]] = []
        self._names: list[str] = []
        self._statements: list[tuple[int, int]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if _hidden(node):
            return False
        if isinstance(node, (cst.SimpleStatementLine, *_BLOCKS)):
            self._statements.append(self._span(node))
        whole = self.get_metadata(WhitespaceInclusivePositionProvider, node)
        self.found += [
            ((".".join(self._names), self._statements[-1]), name, node, new, whole)
            for name, kind, operator in OPERATORS
            if self._statements and isinstance(node, kind)
            for new in _results(operator, node)
        ]
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            self._names.append(node.name.value)
        return not m.matches(node, m.SimpleStatementLine(body=[m.Raise() | m.Assert()]))  # not what they say

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if _hidden(original_node):
            return
        if isinstance(original_node, (cst.SimpleStatementLine, *_BLOCKS)):
            self._statements.pop()
        if isinstance(original_node, (cst.FunctionDef, cst.ClassDef)):
            self._names.pop()

    def _span(self, node: cst.CSTNode) -> tuple[int, int]:
        """The lines of a simple statement, or of the head of a block."""
        place = self.get_metadata(PositionProvider, node)
        if isinstance(node, _BLOCKS) and isinstance(getattr(node, "body", None), cst.IndentedBlock):
            return place.start.line, self.get_metadata(PositionProvider, node.body.body[0]).start.line - 1
        return place.start.line, place.end.line


def _results(operator: object, node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    return list(operator(node))


def _hidden(node: cst.CSTNode) -> bool:
    """What is not run, or only read by people and type checkers."""
    docstring = m.SimpleStatementLine(body=[m.Expr(m.SimpleString() | m.ConcatenatedString())])
    checker = m.Call(func=m.Name("cast") | m.Name("TypeVar") | m.Name("ParamSpec"))
    names = m.SimpleStatementLine(body=[m.Assign(targets=[m.AssignTarget(m.Name("__all__"))])])
    ours = m.Arg(keyword=m.Name("strict"))  # of zip: an assertion, which only a mistake of our own would meet
    chosen = m.Param(default=m.Integer() | m.Float() | m.Tuple())  # a default is a choice, not a consequence
    checking = chosen | m.If(test=m.Name("TYPE_CHECKING"))
    unread = (
        checking | m.Annotation() | m.Decorator() | m.Import() | m.ImportFrom() | docstring | checker | names | ours
    )
    return m.matches(node, unread)
