"""The origin of a patched model: the base model's name, card and licence.

What a record says of the base model was written by whoever made the checkpoint. It is never a path that is read, and as
the name of a repository it is asked for without a token: nothing that only this user may see is published because of
it. What the caller names is taken as it is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from transformers import PretrainedConfig

from ..errors import AttnPatchError
from ..schema import brief
from .hub import Hub

REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
LICENCE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([-_][\w-]+)?(\.(md|txt|rst))?", re.ASCII | re.I)
LARGEST = 1 << 20  # bytes of a licence file or a card
# from the base card's metadata: what each may look like
CARRIED = {
    "license": re.compile(r"[\w.+-]{1,100}", re.ASCII),
    "license_name": re.compile(r"[\w.+ -]{1,100}", re.ASCII),
    "license_link": re.compile(r"https://[\w./%~#?=+-]{1,300}|[\w./-]{1,100}", re.ASCII),
    "language": re.compile(r"[\w-]{1,20}", re.ASCII),
    "pipeline_tag": re.compile(r"[a-z-]{1,50}"),
}


@dataclass(frozen=True)
class Origin:
    """The model that was patched.

    Attributes:
        name: its repository on the Hub; None for a local folder.
        shown: how a reader is told of it; text from elsewhere.
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


def find(
    hub: Hub,
    recorded: str,
    config: PretrainedConfig,
    *,
    base_model: str | None,
    license: str | None,
    license_files: Iterable[str | Path] = (),
) -> Origin:
    """Find the base model, and its licence.

    Args:
        hub: asked for the card of a base model that is a repository.
        recorded: where the base model was loaded from, as the record says: text, of which only the name of a public
            repository is used.
        config: of the patched model; a few families state a licence there.
        base_model: repository of the base model, which the caller's token may read.
        license: identifier, in the place of what the card says.
        license_files: of the caller's disk, to be published with the model.

    Raises:
        AttnPatchError: no licence is known, a name is no repository, a file is no licence, or the Hub cannot be asked.
    """
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise AttnPatchError(f"base_model {base_model!r} is no repository of the Hub; write it as owner/name.")
    if license is not None and not CARRIED["license"].fullmatch(license):
        raise AttnPatchError(f"license {license!r:.80} is no identifier of the Hub, such as 'apache-2.0'.")
    given = [_given(Path(file)) for file in license_files]
    name = base_model or (recorded if REPOSITORY.fullmatch(recorded) else None)
    card: dict[str, Any] = {}
    files: list[Path] = []
    if name is not None:
        told = base_model is not None
        card, files = _remote(hub if told else hub.anonymous(), name, needed=told or license is None, told=told)
    shown = name or (Path(recorded).name if recorded else "") or "a model of this machine"
    found = license or card.get("license") or _stated(config)
    if not found:
        raise AttnPatchError(
            f"the licence of the base model ({shown:.80}) is not known: {_why(name)}; name it with license='mit', say, "
            "or with license='unknown' if it is. license_files=[...] adds its text."
        )
    if license is not None:  # what belongs to another licence must not stand beside this one
        card = {key: value for key, value in card.items() if key not in ("license_name", "license_link")}
    return Origin(name, shown, {**card, "license": found}, [*given, *(f for f in files if f.name not in _names(given))])


def _names(files: Iterable[Path]) -> set[str]:
    return {file.name for file in files}


def _given(file: Path) -> Path:
    """Check that a file which the caller named is a licence."""
    if not LICENCE_FILE.fullmatch(file.name):
        raise AttnPatchError(f"license_files: {file} is not called like one; wanted LICENSE, NOTICE.txt or the like.")
    if not file.is_file():
        raise AttnPatchError(f"license_files: {file} is not there.")
    return file


def _stated(config: PretrainedConfig) -> str | None:
    found = getattr(config, "license", None)
    return found if isinstance(found, str) and CARRIED["license"].fullmatch(found) else None


def _remote(hub: Hub, name: str, *, needed: bool, told: bool) -> tuple[dict[str, Any], list[Path]]:
    """Return a repository's card data and licence files; nothing if there is no repository and none is needed.

    Args:
        hub: to ask.
        name: of the repository.
        needed: whether its card must be there.
        told: whether the caller named it; otherwise the record did.
    """
    head = hub.look(name)
    if head is None:
        if not needed:
            return {}, []
        remedy = "correct base_model" if told else f"pass base_model={name!r} if your token may see it"
        raise AttnPatchError(
            f"base model {name}: the Hub shows no such {'repository' if told else 'public repository'}, so its licence "
            f"is not known; {remedy}, or name the licence with license='apache-2.0', say."
        )
    with hub.explained(name, "reading its card"):
        wanted = [f for f in head.files if f == "README.md" or LICENCE_FILE.fullmatch(f)]
        at = {f: Path(hf_hub_download(name, f, revision=head.commit, token=hub.sent)) for f in wanted}
    large = next((f for f, path in at.items() if path.stat().st_size > LARGEST), None)
    if large is not None:
        raise AttnPatchError(f"{name}/{large}: {at[large].stat().st_size:,} bytes; wanted at most {LARGEST:,}.")
    card = at.pop("README.md", None)
    text = "" if card is None else card.read_text("utf-8", errors="replace")
    return (_metadata(text, f"{name}/README.md") if text else {}), list(at.values())


def _metadata(text: str, where: str) -> dict[str, Any]:
    """Return the part of a card's metadata that is carried over.

    Raises:
        AttnPatchError: it is no card, or says something of another form.
    """
    try:
        found: dict[str, Any] = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except (AttributeError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise AttnPatchError(f"{where}: not a model card: {' '.join(str(error).split())[:200]}") from error
    kept = {key: found[key] for key in CARRIED if found.get(key)}
    for key, value in kept.items():
        parts = value if isinstance(value, list) and key == "language" else [value]
        if not parts or not all(isinstance(part, str) and CARRIED[key].fullmatch(part) for part in parts):
            raise AttnPatchError(
                f"{where}: its {key} is {brief(value)}, which is none; name the licence with license=, and leave "
                "base_model out, or mend the card."
            )
    return kept


def _why(name: str | None) -> str:
    return (
        "its card on the Hub names none" if name else "the record names no repository, and folders are not looked into"
    )
