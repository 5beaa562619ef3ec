"""A release of transformers as its sources show it: modules, functions, classes, calls; nothing is imported.

Read are the modules outside of `models/`, and there those of the Auto classes and every `modeling_*.py`.
"""

from __future__ import annotations

import ast
import functools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LEFT_OUT = re.compile(r"^(cli|pipelines|quantizers|data|exporters)/|models/(?!auto/)(?!\w+/modeling_\w+\.py$)")
TABLES = {"ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS"}
WARNING_CALLS = {"warn", "warning", "warning_once", "warning_advice"}


@dataclass(frozen=True)
class Parameter:
    """One of a signature; `*` and `**` belong to the name, default and annotation are kept as text."""

    name: str
    annotation: str = ""
    default: str | None = None

    def __str__(self) -> str:
        return self.name + ("" if self.default is None else f"={self.default}")


Signature = tuple[Parameter, ...]


@dataclass
class Class:
    """A class as it is written; of its bases only the names are known."""

    name: str
    bases: tuple[str, ...] = ()
    methods: dict[str, Signature] = field(default_factory=dict)
    fields: dict[str, Parameter] = field(default_factory=dict)  # those annotated in the body
    attributes: set[str] = field(default_factory=set)  # assigned in the body or to self; buffers; parameters
    passed: set[str] = field(default_factory=set)  # keywords of its calls of a registered attention function


@dataclass
class Module:
    """What a module defines, imports, exports and passes to registered mask functions."""

    functions: dict[str, Signature] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)  # assigned, imported or named in its tables: what it may export
    tables: dict[str, set[str]] = field(default_factory=dict)  # X_MAPPING_NAMES -> model types
    passed: set[str] = field(default_factory=set)  # by its functions
    deprecated: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, what is said) -> places


@dataclass(frozen=True)
class Release:
    """The modules of a release by dotted name, without the package's own."""

    version: str
    modules: dict[str, Module]

    def classes(self) -> Iterator[tuple[str, Class]]:
        """Every class, with its module."""
        for name, module in self.modules.items():
            for found in module.classes.values():
                yield name, found

    def find(self, module: str, name: str) -> Signature | Class | None:
        """What `from module import name` gives, where it is a function or a class."""
        if not self.has(module, name):
            return None
        here = self.modules[module]
        return here.functions.get(name) or here.classes.get(name) or self.by_name.get(name)

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` has something to import."""
        if f"{module}.{name}".strip(".") in self.modules:
            return True
        here = self.modules.get(module)
        if here is None:
            return False
        gathered = not module and name in self.by_name  # from __all__ of the families
        return gathered or name in here.names or name in here.functions or name in here.classes

    def line(self, found: Class) -> list[Class]:
        """A class and what it inherits from, nearest first; bases are looked up by name."""
        line, todo = [found], list(found.bases)
        while todo:
            base = self.by_name.get(todo.pop(0))
            if isinstance(base, Class) and base not in line:
                line.append(base)
                todo += base.bases
        return line

    @functools.cached_property
    def by_name(self) -> dict[str, Signature | Class]:
        """A function or class for each name; of several, one outside of models/."""
        modules = sorted(self.modules.items(), key=lambda pair: not pair[0].startswith("models."))
        return {name: found for _, each in modules for name, found in {**each.functions, **each.classes}.items()}


def read(source: Path) -> Release:
    """Reads a release.

    Args:
        source: a wheel, or the folder of an installed package.

    Raises:
        SystemExit: no package is there.
    """
    texts = dict(_wheel(source) if source.suffix == ".whl" else _folder(source))
    if "__init__.py" not in texts:
        raise SystemExit(f"upstream_changes: {source} holds no package; wanted: a wheel, or a folder with __init__.py.")
    version = re.search(r'^__version__ = "(.*)"', texts["__init__.py"], re.MULTILINE)
    modules = {_dotted(name): parse(text) for name, text in texts.items()}
    return Release(version[1] if version else source.name, modules)


def _folder(source: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(source.rglob("*.py")):
        name = str(path.relative_to(source))
        if not LEFT_OUT.search(name):
            yield name, path.read_text("utf-8")


def _wheel(source: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(source) as wheel:
        for path in sorted(wheel.namelist()):
            name = path.partition("/")[2]
            if path.endswith(".py") and not LEFT_OUT.search(name):
                yield name, wheel.read(path).decode("utf-8")


def _dotted(name: str) -> str:
    return name.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


@functools.cache
def parse(text: str) -> Module:
    """Reads a module; a file that two releases share is read once."""
    module = Module()
    for node in ast.parse(text).body:
        _read_statement(node, module)
    return module


def _read_statement(node: ast.stmt, module: Module) -> None:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        nodes = list(ast.walk(node))
        module.functions[node.name] = _signature(node.args)
        module.passed |= _passed(nodes)
        module.deprecated += _deprecations(nodes)
    elif isinstance(node, ast.ClassDef):
        nodes = list(ast.walk(node))
        module.classes[node.name] = _class(node, nodes)
        module.deprecated += _deprecations(nodes)
    elif isinstance(node, (ast.If, ast.Try)):
        for inner in ast.iter_child_nodes(node):
            for each in [inner] if isinstance(inner, ast.stmt) else getattr(inner, "body", ()):
                _read_statement(each, module)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        module.names |= {alias.asname or alias.name for alias in node.names}
    else:
        _read_values(node, module)


def _read_values(node: ast.stmt, module: Module) -> None:
    texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    targets = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    module.names |= targets | texts
    for name in targets:
        if name.endswith("_MAPPING_NAMES"):
            pairs = [each.elts[0] for each in ast.walk(node) if isinstance(each, ast.Tuple) and len(each.elts) == 2]
            keys = [*pairs, *(key for each in ast.walk(node) if isinstance(each, ast.Dict) for key in each.keys)]
            module.tables[name] = {str(key.value) for key in keys if isinstance(key, ast.Constant)}


def _class(node: ast.ClassDef, nodes: list[ast.AST]) -> Class:
    found = Class(node.name, tuple(ast.unparse(base).split(".")[-1] for base in node.bases), passed=_passed(nodes))
    for each in node.body:
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.methods[each.name] = _signature(each.args)
        elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            found.fields[each.target.id] = _parameter(each.target.id, each.annotation, each.value)
        elif isinstance(each, ast.Assign):
            found.attributes |= {target.id for target in each.targets if isinstance(target, ast.Name)}
    for each in nodes:
        if (
            isinstance(each, ast.Attribute)
            and isinstance(each.ctx, ast.Store)
            and getattr(each.value, "id", "") == "self"
        ):
            found.attributes.add(each.attr)
        elif isinstance(each, ast.Call) and _called(each) in ("register_buffer", "register_parameter") and each.args:
            found.attributes |= {str(each.args[0].value)} if isinstance(each.args[0], ast.Constant) else set()
    return found


def _signature(arguments: ast.arguments) -> Signature:
    plain = [*arguments.posonlyargs, *arguments.args]
    first = len(plain) - len(arguments.defaults)
    found = [
        _parameter(a.arg, a.annotation, arguments.defaults[i - first] if i >= first else None)
        for i, a in enumerate(plain)
    ]
    if arguments.vararg or arguments.kwonlyargs:
        found.append(Parameter("*" + (arguments.vararg.arg if arguments.vararg else "")))
    found += [
        _parameter(a.arg, a.annotation, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return (*found, Parameter("**" + arguments.kwarg.arg)) if arguments.kwarg else tuple(found)


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    text = "" if annotation is None else ast.unparse(annotation)
    return Parameter(name, text, None if default is None else ast.unparse(default))


def _passed(nodes: list[ast.AST]) -> set[str]:
    """Keywords of calls of what is taken out of a table of attention or mask functions."""
    if not any(isinstance(node, ast.Name) and node.id in TABLES for node in nodes):
        return set()
    assigned = [node for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None]
    taken = [node for node in assigned if any(getattr(each, "id", "") in TABLES for each in ast.walk(node.value))]
    targets = [target for node in taken for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    calls = [node for node in nodes if isinstance(node, ast.Call) and _called(node) in names]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}


def _deprecations(nodes: list[ast.AST]) -> Counter[tuple[str, str]]:
    """What decorators and messages call deprecated: the name, and what is said of it."""
    found: Counter[tuple[str, str]] = Counter()
    for call in (node for node in nodes if isinstance(node, ast.Call) and node.args):
        if _called(call) == "deprecate_kwarg":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            texts = [ast.unparse(each).strip("'") for each in (*call.args[1:2], *filter(None, [given.get("version")]))]
            texts += [f"use {ast.unparse(given['new_name'])}"] if "new_name" in given else []
            found[ast.unparse(call.args[0]).strip("'"), ", ".join(texts)] += 1
        elif _called(call) in WARNING_CALLS:
            parts = [str(each.value) for each in ast.walk(call.args[0]) if isinstance(each, ast.Constant)]
            before, word, _ = " ".join(parts).partition("deprecated")
            for name in re.findall(r"`(\w+)`", before) if word else ():
                found[name, " ".join(parts)] += 1
    return found


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
