"""What a mutation pass found: `modules.csv` (counts), `survivors.csv` (each that was not killed) and `README.md`."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

_HEAD = """# Mutation pass

`make mutation` (`scripts/mutation.yaml` names modules, tests and samples; `scripts/mutants.py` changes, mutmut's and
a few more): one change at a time, and the tests that reach it are run until one fails. *First* is what the tests did
before the pass, *now* what they do since. A timeout counts as noticed. The tests of a module are few and fast, so that
a mutant costs a second or so; what those do not reach, others may.

"""
_COLUMNS = {
    "mutants": "mutants",
    "run": "drawn",
    "killed": "killed first",
    "timeout": "timeout first",
    "survived": "survived first",
    "not_covered": "not reached first",
    "alive": "survive now",
    "bare": "not reached now",
    "same": "equivalent",
    "gone": "code gone",
    "seconds": "seconds",
}
ALIVE = ("survived", "not covered")


@dataclass
class Row:
    """One mutant that was not killed at first, or is not now.

    Attributes:
        module: path inside the package.
        function: dotted name of what it stands in.
        old: the statement's changed lines.
        new: the same after the change.
        occurrence: which one of equal changes in the function.
        operator: name of the change.
        line: where it is now.
        first: outcome when its module was first run.
        now: outcome of the last run; ``gone`` when the code is no longer there, ``equivalent`` when no test can see it.
        why: what makes it equivalent.
    """

    module: str
    function: str
    old: str
    new: str
    occurrence: int
    operator: str
    line: int
    first: str
    now: str
    why: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What it is known by."""
        return self.module, self.function, self.old, self.new, self.occurrence


@dataclass
class Module:
    """How one module's mutants fared: ``mutants`` there are, ``run`` of them drawn, in so many seconds."""

    module: str
    mutants: int
    run: int
    killed: int
    survived: int
    timeout: int
    not_covered: int
    seconds: int

    def beside(self, other: Module | None) -> Module:
        """Both runs of one module as one."""
        if other is None:
            return self
        counted = [f.name for f in fields(Module) if f.name not in ("module", "mutants")]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in counted})


def read(folder: Path) -> tuple[dict[str, Module], dict[tuple[str, ...], Row]]:
    """What the last runs left, by module and by mutant."""
    modules = {m.module: m for m in _rows(folder / "modules.csv", Module)}
    return modules, {row.key: row for row in _rows(folder / "survivors.csv", Row)}


def write(folder: Path, modules: dict[str, Module], rows: dict[tuple[str, ...], Row]) -> None:
    """Write all three files."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "modules.csv", Module, sorted(modules.values(), key=lambda m: m.module))
    ordered = sorted(rows.values(), key=lambda row: (row.module, row.line, row.new, row.occurrence))
    _save(folder / "survivors.csv", Row, ordered)
    (folder / "README.md").write_text(_page(modules, ordered), "utf-8")


def _page(modules: dict[str, Module], rows: list[Row]) -> str:
    lines, sums = [], Counter[str]()
    for name, module in sorted(modules.items()):
        own = Counter(row.now for row in rows if row.module == name)
        cells = {**asdict(module), "alive": own["survived"], "bare": own["not covered"], "same": own["equivalent"]}
        cells["gone"] = own["gone"]
        cells.pop("module")
        sums.update(cells)
        lines.append(_line(f"`{name}`", cells))
    head = ("| module | " + " | ".join(_COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(_COLUMNS))
    text = _HEAD + "\n".join([*head, *lines, _line("all", sums)]) + "\n"
    for title, wanted in (("Alive", ALIVE), ("Equivalent: no test can see them", ("equivalent",))):
        found = [row for row in rows if row.now in wanted]
        if found:
            text += f"\n## {title}\n\n" + "\n".join(map(_bullet, found)) + "\n"
    return text


def _line(name: str, cells: dict[str, int]) -> str:
    return f"| {name} | " + " | ".join(f"{cells[column]:,}" for column in _COLUMNS) + " |"


def _bullet(row: Row) -> str:
    place = f"`{row.module}:{row.line}` {row.function}"
    change = f"`` {row.old} `` -> `` {row.new or '(nothing)'} ``"
    return f"* {place}: {change}" + (f": {row.why}" if row.why else f" ({row.now})")


def _rows(path: Path, kind: type) -> list:
    if not path.is_file():
        return []
    numbers = {f.name for f in fields(kind) if f.type == "int"}
    with path.open(newline="", encoding="utf-8") as file:
        return [kind(**{k: int(v) if k in numbers else v for k, v in row.items()}) for row in csv.DictReader(file)]


def _save(path: Path, kind: type, rows: list) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
