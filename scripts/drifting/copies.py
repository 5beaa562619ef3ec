"""A copy of the installed transformers with a change; files that stay the same are the installed ones."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from .move import Move
from .rename import Rename
from .shape import TYPES, AddArgument, PassByKeyword, WrapReturn
from .source import PACKAGE, InvalidMutation, Source
from .written import Decorate, KeywordOnly, PassByPosition, Rewrite

Change = Rename | Move | AddArgument | PassByKeyword | WrapReturn | Decorate | KeywordOnly | PassByPosition | Rewrite

ENGINE = ("copies", "move", "rename", "shape", "source", "written")

# what no model imports: sources of other files, and conversions of checkpoints of others
_UNUSED = re.compile(r"(^|/)(modular_\w+|convert_\w+)\.py$")


def make(root: Path, place: Path, changes: Sequence[Change], models: Collection[str] = ()) -> int:
    """Write the copy, or keep one that is there with the same changes.

    Args:
        root: folder of the installed package.
        place: folder for the copy, which is what goes onto ``sys.path``.
        changes: in order.
        models: folders below ``models`` that are changed, the others staying as they are; all where there are none.

    Returns:
        The number of files that are changed.

    Raises:
        InvalidMutation: a change is not consistent, or changes nothing.
    """
    done, wanted = place / "made", _digest(_engine(), root, (*changes, *sorted(models)))
    if done.is_file() and done.read_text("utf-8").splitlines()[0] == wanted:
        return len(changed(place))
    texts: dict[str, str] = {}
    for change in changes:
        if not sum(_apply(root, change, texts, models)):
            raise InvalidMutation(f"nothing is changed by {change}")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root, place / PACKAGE, copy_function=_link)
    for name, text in texts.items():
        _write(place / PACKAGE / name, text)
    done.write_text("\n".join([wanted, *texts]), "utf-8")
    return len(texts)


def changed(place: Path) -> list[str]:
    """Return the paths of the files of a copy that are not the installed ones."""
    return (place / "made").read_text("utf-8").splitlines()[1:]


def touches(place: Path, folder: str) -> bool:
    """Whether a copy changes the model of a folder below ``models``, or what all models share."""
    shared = [name for name in changed(place) if not name.startswith("models/") and name != f"{TYPES}.py"]
    return bool(shared) or any(name.startswith((f"models/{folder}/", "models/auto/")) for name in changed(place))


def digest(root: Path, changes: Sequence[object]) -> str:
    """Name changes of a release."""
    return _digest(b"", root, changes)


def _digest(engine: bytes, root: Path, changes: Sequence[object]) -> str:
    parts = [engine, repr(tuple(changes)).encode(), (root / "__init__.py").read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _engine() -> bytes:
    return b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in ENGINE)


def files(root: Path, models: Collection[str] = ()) -> Iterator[str]:
    """Yield the paths of the files that these models may import, or any."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        family = re.match(r"models/(\w+)/", name)
        if not _UNUSED.search(name) and (not models or family is None or family.group(1) in models):
            yield name


def _apply(root: Path, change: Change, texts: dict[str, str], models: Collection[str]) -> Iterator[bool]:
    """Apply one change to all files, those that earlier ones have written as they are now."""
    for name in dict.fromkeys([*files(root, models), *texts]):
        text = texts[name] if name in texts else (root / name).read_text("utf-8")
        if not change.concerns(name, text):
            continue
        source = Source(name, text)
        change.edit(source)
        if source.touched:
            texts[name] = source.result()
        yield source.touched
    if isinstance(change, Move):
        yield from _moved(root, change, texts)
    elif isinstance(change, (WrapReturn, Decorate, Rewrite)) and change.module:
        texts[f"{TYPES}.py"] = texts.get(f"{TYPES}.py", "") + change.module


def _moved(root: Path, change: Move, texts: dict[str, str]) -> Iterator[bool]:
    if not (root / change.file).is_file():
        raise InvalidMutation(f"{change.old}: there is no {change.file} to be moved")
    texts[change.place] = texts[change.file] if change.file in texts else (root / change.file).read_text("utf-8")
    texts[change.file] = ""  # nothing is left there, see `_write`
    for parent in Path(change.place).parents:
        init = (parent / "__init__.py").as_posix()
        if init != "__init__.py" and not (root / init).is_file():
            texts.setdefault(init, "#\n")
    yield True


def _write(path: Path, text: str) -> None:
    """Write a file in the place of the installed one, without the latter's bytecode; no text means no file."""
    path.unlink(missing_ok=True)
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def _link(source: str, target: str) -> str:
    """One more name for a file; a symbolic link where the copy lies on another disk."""
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source, target)
    return target
