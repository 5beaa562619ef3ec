"""Checks what exists at OUT and whether it may be replaced, before any work."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import AttnPatchError
from ..schema import from_json, text_of

# What `save_pretrained` of models, tokenizers and processors writes, and what a repository of the Hub has beside it.
# A folder that holds anything else holds somebody's work.
_OURS = re.compile(
    r"config\.json|generation_config\.json|(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[\w.-]+\.model|bpe\.codes|chat_template\.(json|jinja)|additional_chat_templates"
    r"|(pre|video_pre)?processor_config\.json|(modeling|configuration|tokenization)_\w+\.py"
    r"|README\.md|\.gitattributes|(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*|attnpatch"
)


def check_target(target: Path, overwrite: bool, inputs: Mapping[str, str | Path | None]) -> Path:
    """Return the absolute path of a folder that may be written.

    Args:
        target: where the folder is wanted.
        overwrite: whether a checkpoint that is there may be replaced.
        inputs: how the user knows a file or a folder that is read, such as ``--plan`` -> its path. None of them may lie
            in the target; only ``MODEL`` may be the target itself.

    Raises:
        AttnPatchError: something is in the way.
    """
    target = Path(os.path.abspath(target))
    _check_kind(target)
    for name, path in inputs.items():
        if path is not None and os.path.lexists(path):
            _check_input(target, name, Path(path))
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise AttnPatchError(
                f"{target} is not empty; choose another OUT, or add --overwrite to replace a checkpoint."
            )
        _check_checkpoint(target)
    return target


def check_room(target: Path, size: int) -> None:
    """Refuse a disk without room for a checkpoint, before the work that would end there.

    Args:
        target: where it is wanted; need not be there.
        size: of the checkpoint, in bytes.

    Raises:
        AttnPatchError: there is less room.
    """
    there = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < size:
        raise AttnPatchError(
            f"{target}: the checkpoint takes some {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there (what is "
            "replaced stays until the new one is whole); make room, or choose another OUT."
        )


def _check_kind(target: Path) -> None:
    """Refuse paths that cannot or must not be replaced, whatever they contain."""
    if target.is_symlink():
        raise AttnPatchError(f"{target} is a link to {os.readlink(target)}; name the folder itself, or another OUT.")
    if os.path.lexists(target) and not target.is_dir():
        raise AttnPatchError(f"{target} is a file; wanted the name of a folder.")
    if os.path.ismount(target):
        raise AttnPatchError(f"{target} is a mount point, which no folder can take the place of; choose one inside it.")
    here = Path.cwd().resolve()
    if target.resolve() in (here, *here.parents):
        raise AttnPatchError(f"{target} is the current folder, or holds it; choose another OUT.")


def _check_input(target: Path, name: str, path: Path) -> None:
    place, found = target.resolve(), path.resolve()
    if place in found.parents or (place == found and name != "MODEL"):
        raise AttnPatchError(f"{target} holds {name}, {path}, which replacing it would delete; choose another OUT.")


def _check_checkpoint(folder: Path) -> None:
    """Check that a folder is a checkpoint and nothing else, because what is replaced is deleted."""
    advice = "--overwrite replaces a checkpoint and nothing else; choose another OUT"
    others = sorted(entry.name for entry in folder.iterdir() if not _OURS.fullmatch(entry.name))
    if others:
        few = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise AttnPatchError(f"{folder} holds {few}, which is no part of a checkpoint; {advice}, or move it away.")
    if not _says_model(folder / "config.json"):
        raise AttnPatchError(f"{folder} has no config.json of a model; {advice}.")


def _says_model(config: Path) -> bool:
    try:
        found = from_json(text_of(config), str(config), finite=False)
    except (OSError, AttnPatchError):  # no file, no text, no JSON
        return False
    return isinstance(found, dict) and ("model_type" in found or "architectures" in found)


Picture = tuple[tuple[str, int, int, int], ...]


def picture(folder: Path) -> Picture:
    """Return a fingerprint of a folder's files and their state; empty for no entries."""
    return tuple(sorted(_entries(folder)))


def _entries(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            found = path.lstat()
            yield str(path.relative_to(folder)), found.st_ino, found.st_size, found.st_mtime_ns
