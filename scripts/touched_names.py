"""What hf_attnpatch touches in transformers, read from its own sources: imports, words, private names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UPSTREAM = "transformers"


@dataclass(frozen=True)
class Touched:
    """Names, each with those of our files that have it.

    Attributes:
        imports: (module, name) of `from transformers.module import name`; the package's own module is "".
        words: every attribute, keyword, parameter and string that could name something of transformers.
        private: what tests/test_upstream.py lists.
    """

    imports: dict[tuple[str, str], set[str]]
    words: dict[str, set[str]]
    private: tuple[str, ...]


def read(package: Path, upstream_test: Path) -> Touched:
    """Reads our package, and the table PRIVATE of the test that lists private names."""
    imports, words = defaultdict(set), defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        name = str(path.relative_to(package))
        for found in _imports(tree):
            imports[found].add(name)
        for word in _words(tree):
            words[word].add(name)
    return Touched(dict(imports), dict(words), _private(ast.parse(upstream_test.read_text("utf-8"))))


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What is imported, and what is read from an imported module, as in `masking_utils.causal_mask_function`."""
    called = {}  # our name for it -> its module in transformers
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == UPSTREAM:
            module = (node.module or "").removeprefix(UPSTREAM).strip(".")
            for alias in node.names:
                called[alias.asname or alias.name] = f"{module}.{alias.name}".strip(".")
                yield module, alias.name
        elif isinstance(node, ast.Import):
            called |= {alias.name: "" for alias in node.names if alias.name == UPSTREAM}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in called:
            module = called[node.value.id]
            if not module.rpartition(".")[2][:1].isupper():  # of a class it is a member, which `words` has
                yield module, node.attr


def _words(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.keyword, ast.arg)) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            yield node.value


def _private(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "PRIVATE"
            and isinstance(node.value, ast.Dict)
        ):
            return tuple(key.value for key in node.value.keys if isinstance(key, ast.Constant))
    raise SystemExit(
        "upstream_changes: tests/test_upstream.py has no table PRIVATE; wanted: private name -> its check."
    )
