"""Where a patched model comes from: the base model's name, card and licence."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from transformers import PretrainedConfig

from ..errors import AttnPatchError
from .hub import Hub

REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the base card's metadata
_LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)[^/]*", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """The model that was patched.

    Attributes:
        name: its repository on the Hub; None for a local folder.
        shown: how a reader is told of it.
        card: the metadata of its card that is carried over, licence included.
        files: its licence files, on this disk.
    """

    name: str | None
    shown: str
    card: Mapping[str, Any]
    files: Sequence[Path]

    def copy_licences(self, folder: Path) -> None:
        """Put the licence files into a folder."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)


def find(hub: Hub, recorded: str, config: PretrainedConfig, *, base_model: str | None, license: str | None) -> Origin:
    """Look the base model up, and its licence.

    Args:
        hub: asked for the card of a base model that is a repository.
        recorded: where the base model was loaded from, as the record says: a repository or a folder of this machine.
        config: of the patched model; a few families state a licence there.
        base_model: repository of the base model, where the record only knows a folder.
        license: identifier, in the place of what the card says.

    Raises:
        AttnPatchError: no licence is known, the name is no repository, or the Hub cannot be asked.
    """
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise AttnPatchError(f"base_model {base_model!r} is no repository of the Hub; write it as owner/name.")
    folder = Path(recorded) if recorded and Path(recorded).is_dir() else None
    name = base_model or (None if folder or not REPOSITORY.fullmatch(recorded) else recorded)
    card, files = _local(folder) if folder else ({}, [])
    if name is not None and (license is None or not folder):
        remote, more = _remote(hub, name, needed=license is None and "license" not in card)
        card, files = {**remote, **card}, [*files, *(f for f in more if f.name not in {x.name for x in files})]
    shown = name or (folder.name if folder else "a model of this machine")
    found = license or card.get("license") or getattr(config, "license", None)
    if not found:
        raise AttnPatchError(
            f"the licence of the base model ({shown}) is not known: {_why(name, folder)}; name it with license='mit', "
            "say, or with license='unknown' if it is."
        )
    if license is not None:  # what belongs to another licence must not stand beside this one
        card = {key: value for key, value in card.items() if key not in ("license_name", "license_link")}
    return Origin(name, shown, {**card, "license": found}, files)


def _local(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Return what a folder's card says, and its licence files."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and _LICENCE_FILE.fullmatch(f.name))
    card = folder / "README.md"
    return (_metadata(card.read_text("utf-8"), str(card)) if card.is_file() else {}), files


def _remote(hub: Hub, name: str, *, needed: bool) -> tuple[dict[str, Any], list[Path]]:
    """Return what a repository's card says, and its licence files; nothing where there is none and none is needed."""
    head = hub.look(name)
    if head is None:
        if not needed:
            return {}, []
        raise AttnPatchError(
            f"base model {name}: the Hub shows no such repository, so its licence is not known; correct base_model, "
            "or name the licence with license='apache-2.0', say."
        )
    with hub.explained(name, "reading its card"):
        wanted = [f for f in head.files if f == "README.md" or _LICENCE_FILE.fullmatch(f)]
        at = {f: Path(hf_hub_download(name, f, revision=head.commit, token=hub.given)) for f in wanted}
    card = at.pop("README.md", None)
    return (_metadata(card.read_text("utf-8"), f"{name}/README.md") if card else {}), list(at.values())


def _metadata(text: str, where: str) -> dict[str, Any]:
    """Return what is carried over of a card's metadata.

    Raises:
        AttnPatchError: it is no card.
    """
    try:
        found: dict[str, Any] = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except (ValueError, yaml.YAMLError) as error:
        raise AttnPatchError(f"{where}: not a model card: {' '.join(str(error).split())[:200]}") from error
    return {key: found[key] for key in CARRIED if found.get(key)}


def _why(name: str | None, folder: Path | None) -> str:
    if name is not None:
        return "its card on the Hub names none"
    return (
        "its folder has no README.md that names one" if folder else "the record names neither a folder nor a repository"
    )
