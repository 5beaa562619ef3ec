"""Prints what changed between two releases of transformers in what hf_attnpatch touches, from the sources alone.

    python scripts/upstream_changes.py 5.23.0 5.24.0     # wheels from the package index
    python scripts/upstream_changes.py old.whl .venv/lib/python3.11/site-packages/transformers --all

Names are compared where they are written: signatures of every forward, function and method, fields of output classes,
cache methods, what attention modules set and pass on, model types, what we import, the private names of
tests/test_upstream.py. Nothing is imported and no test is run. What we name ourselves comes first, with the number of
our files that name it; --all lists the rest, too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import release_arguments
import release_changes as changes
import release_sources
import touched_names
from release_sources import Release
from touched_names import Touched

ROOT = Path(__file__).resolve().parents[1]
WIDTH, SHOWN, NAME = 150, 6, 38  # characters of a line, rows of a section, characters of a name
MANY = 10  # places: as many are shown, whoever names them


def found(source: str, folder: Path) -> Release:
    """Reads a release: a folder or wheel where there is one, otherwise a version that pip is asked for."""
    if Path(source).exists():
        return release_sources.read(Path(source))
    if not re.fullmatch(r"[\d.]+\w*", source):
        raise SystemExit(f"upstream_changes: {source} is no version, and no wheel or folder of that name is there.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, f"{touched_names.UPSTREAM}=={source}"], check=True)
    return release_sources.read(next(folder.glob(f"{touched_names.UPSTREAM}-{source}-*.whl")))


def report(old: Release, new: Release, touched: Touched, everything: bool = False) -> str:
    """The text: what we name first, then what else could concern us, by count."""
    names = release_arguments.arguments(release_arguments.places(old, new), touched)
    gone, added = changes.attributes(old, new)
    dropped, passed = changes.passed(old, new)
    sections = {
        "RENAMED: arguments and output fields": _renamed(names, touched),
        "GONE: arguments and output fields": _named(names.gone, touched, everything),
        "MOVED: arguments in another order": _named(names.moved, touched, everything),
        "NEW: arguments that are required or stand before older ones": _named(names.new, touched, True),
        "IMPORTS, and members that we name": _pairs(changes.imports(old, new, touched)),
        "PRIVATE NAMES of tests/test_upstream.py": _pairs(changes.private(old, new, touched)),
        "CACHES": _pairs(sorted(changes.caches(old, new), key=lambda pair: pair[1] == "new")),
        "ATTENTION MODULES no longer set": _named(gone, touched, everything),
        "ATTENTION MODULES newly set": _named(added, touched, everything),
        "PASSED to attention and mask functions no longer": _named(dropped, touched, True),
        "PASSED to attention and mask functions newly": _named(passed, touched, True),
        "DEPRECATED, of what we name": [
            f"{name:<{NAME}} {count:>4} places: {words}"
            for name, (count, words) in changes.deprecated(old, new, touched).items()
        ],
        "CLASSES of families that are gone": [
            f"{family:<{NAME}} {' '.join(lost)}" for family, lost in changes.lost_classes(old, new).items()
        ],
        "MODEL TYPES": list(_types(old, new)),
    }
    lines = [f"transformers {old.version} -> {new.version}: what changed of what hf_attnpatch touches"]
    for title, rows in sections.items():
        shown = rows if everything or len(rows) <= SHOWN else [*rows[:SHOWN], f"and {len(rows) - SHOWN} more: --all"]
        lines += [title, *(line for row in shown for line in _wrapped(row))] if rows else []
    lines.append(f"NOTHING in: {'; '.join(title for title, rows in sections.items() if not rows) or '-'}")
    lines.append(f"Looked for: {len(touched.imports)} imported names, {len(touched.private)} private names.")
    return "\n".join(lines)


def _wrapped(row: str) -> list[str]:
    return textwrap.wrap(row, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False)


def _renamed(names: release_arguments.Arguments, touched: Touched) -> list[str]:
    order = sorted(names.renamed.items(), key=lambda item: (item[0][0] not in touched.words, -item[1].total()))
    return [f"{f'{old} -> {new}':<{NAME}} {_files(old, touched):<16} {each}" for (old, new), each in order]


def _named(names: Mapping[str, release_arguments.Names], touched: Touched, everything: bool) -> list[str]:
    """Rows by count; rare names that our files do not have are only counted, unless everything is wanted."""
    order = sorted(names.items(), key=lambda item: (item[0] not in touched.words, -item[1].total()))
    ours = [(name, each) for name, each in order if everything or name in touched.words or each.total() >= MANY]
    rest = [f"and {len(order) - len(ours)} rare ones that we do not name"] if len(order) > len(ours) else []
    return [f"{name:<{NAME}} {_files(name, touched):<16} {each}" for name, each in ours] + rest


def _files(word: str, touched: Touched) -> str:
    files = len(touched.words.get(word, ()))
    return f"in {files} of our files" if files else ""


def _pairs(found: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{label:<{NAME}} {words}" for label, words in found]


def _types(old: Release, new: Release) -> Iterator[str]:
    for label, lost, gained in changes.model_types(old, new):
        yield from [f"{label} lost: {' '.join(lost)}"] if lost else []
        yield from [f"{label} new: {' '.join(gained)}"] if gained else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads both and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a version, a wheel, or the folder of an installed package")
    parser.add_argument("new", help="the same")
    parser.add_argument("--all", action="store_true", help="every name, not only ours and the most frequent")
    given = parser.parse_args(arguments)
    if given.old == given.new:
        print(f"transformers {given.new} is the newest and the locked one: nothing to compare.")
        return
    touched = touched_names.read(ROOT / "hf_attnpatch", ROOT / "tests" / "test_upstream.py")
    with tempfile.TemporaryDirectory() as folder:
        print(report(found(given.old, Path(folder)), found(given.new, Path(folder)), touched, given.all))


if __name__ == "__main__":
    main()
