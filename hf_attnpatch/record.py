"""``config.attnpatch``: the versioned record of a model's patches, saved in its checkpoints."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from .errors import AttnPatchError
from .patch import Patch, from_spec
from .schema import brief, fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELD = "attnpatch"
VERSION = 1


@dataclass(frozen=True)
class Record:
    """The patches of a model, in the order in which they were applied.

    Attributes:
        patches: each in the form of ``Patch.to_record``.
        base_model: repository that the model was loaded from, or ``./name`` of a folder; see :func:`source_of`.
        base_model_type: transformers' model type of the unpatched model.
        stock: whether transformers alone loads the checkpoint.
        versions: of this package and of transformers when it was written.
        commands: command lines that made the checkpoint, in order; empty if a script did.
        contexts: context that the model declared, in tokens, before each patch that raised it and after the last.
    """

    patches: tuple[Mapping[str, Any], ...]
    base_model: str
    base_model_type: str
    stock: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        lists = {"commands": list(self.commands), "contexts": list(self.contexts)}
        return {
            "version": VERSION,
            "patches": [dict(p) for p in self.patches],
            "base_model": self.base_model,
            "base_model_type": self.base_model_type,
            "stock": self.stock,
            "versions": dict(self.versions),
            **{name: entries for name, entries in lists.items() if entries},
        }

    def restore(self) -> list[Patch]:
        """Return the patches whose structure does not follow from the config; their weights are in the checkpoint."""
        return [_patch_of(spec).structure() for spec in self.patches if not spec.get("stock")]


@dataclass(frozen=True)
class _Written:
    """A record in JSON form; see :class:`Record`."""

    version: int
    patches: list[dict[str, Any]]
    base_model: str
    base_model_type: str
    stock: bool
    versions: dict[str, str]
    commands: list[str] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)


_MOST, _LONGEST = 64, 16_384  # entries of a list, characters of a text
_TYPE = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Fields of earlier releases that are now found by analysing the model: patch -> field.
_FOUND_AGAIN = {
    **dict.fromkeys(("self_extend", "dual_chunk", "re_rope", "jet_long", "attention_sinks"), "found"),
    **{"segment_recurrence": "turning", "rotary": "counted"},
}


def parse(data: object) -> Record:
    """Read a record, which anybody may have written.

    Nothing in it is used as a path or as code. Patches must leave a trace in a checkpoint, with fields that a user can
    set. Fields that earlier releases added are ignored and found again.

    Raises:
        AttnPatchError: a field is missing, unknown or of the wrong type, or a newer version wrote it.
    """
    if not isinstance(data, Mapping):
        raise AttnPatchError(f"config.{FIELD} is {type(data).__name__}; it must be the mapping this package writes.")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise AttnPatchError(
            f"config.{FIELD}.version is {brief(version)}; this release reads 1 to {VERSION}; upgrade hf_attnpatch."
        )
    found = fields_of(_Written, data, f"config.{FIELD}")
    found.patches[:] = [_chosen(number, spec) for number, spec in enumerate(found.patches)]
    _check_sizes(found)
    for number, spec in enumerate(found.patches):
        where = f"config.{FIELD}.patches[{number}]"
        try:
            _patch_of(spec)
        except AttnPatchError as error:
            raise AttnPatchError(f"{where}: {brief(str(error), 400)}") from error
    return Record(
        tuple(found.patches),
        found.base_model,
        found.base_model_type,
        found.stock,
        found.versions,
        tuple(found.commands),
        tuple(found.contexts),
    )


def _check_sizes(found: _Written) -> None:
    for name in ("patches", "versions", "commands", "contexts"):
        if len(getattr(found, name)) > _MOST:
            raise AttnPatchError(f"config.{FIELD}.{name} has {len(getattr(found, name))} entries, at most {_MOST}.")
    texts = (found.base_model, *found.commands, *found.versions, *found.versions.values())
    if any(len(text) > _LONGEST for text in texts):
        raise AttnPatchError(f"config.{FIELD}: a text of more than {_LONGEST} characters.")
    if not all(0 < context < 1 << 31 for context in found.contexts):
        raise AttnPatchError(f"config.{FIELD}.contexts is {brief(found.contexts)}; wanted numbers of tokens.")
    if not _TYPE.fullmatch(found.base_model_type):
        raise AttnPatchError(f"config.{FIELD}.base_model_type is {brief(found.base_model_type)}; wanted a model type.")


def _chosen(number: int, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's fields of a recorded patch, without what earlier releases added."""
    name = spec.get("patch")
    again = _FOUND_AGAIN.get(name) if isinstance(name, str) else None
    if again in spec:
        warnings.warn(
            f"config.{FIELD}.patches[{number}].{again} is ignored: an earlier release wrote it, and this one finds out "
            "by itself how a model rotates its keys. Save the checkpoint again to remove it.",
            stacklevel=2,
        )
    return {key: value for key, value in spec.items() if key != again}


def _patch_of(spec: Mapping[str, Any]) -> Patch:
    """Build a patch from a record, in which tuples are lists."""
    if not isinstance(spec.get("stock", False), bool):
        raise AttnPatchError(f"stock is {brief(spec['stock'])}; it must be true or false.")
    return from_spec({key: value for key, value in spec.items() if key != "stock"}, recorded=True)


def note_command(folder: Path, command: str) -> None:
    """Add the command line that made a saved checkpoint to the record in its config; without one, do nothing."""
    data = json.loads((folder / "config.json").read_text("utf-8")).get(FIELD)  # which save_pretrained has just written
    if data is not None:
        found = parse(data)
        rewrite(folder, replace(found, commands=(*found.commands, command)))


def rewrite(folder: Path, record: Record) -> None:
    """Replace the record in a saved checkpoint's config."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text("utf-8")), FIELD: record.to_dict()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


# The name of a model that differs from what its old name refers to. An adapter trained on it (PEFT), or a trainer that
# needs a reference model (TRL), stores this as the base; loading it raises an error that quotes the text, where the old
# name would silently give the unpatched model. Plain text, because it is written into YAML.
IN_MEMORY = "patched in memory by hf_attnpatch: save_pretrained, load from there, and go on"
LOADED_FROM = "attnpatch_loaded_from"  # attribute of such a model
READ = "attnpatch_read"  # attribute of a model from ``load``: its checkpoint, and the names there that no class loads


def loaded_from(model: PreTrainedModel) -> str:
    """Return the name or path from which a model was loaded, patched since or not; empty if it was built."""
    found = vars(model).get(LOADED_FROM) or getattr(model.config, "_name_or_path", None) or ""
    return str(found)


def source_of(model: PreTrainedModel) -> str:
    """Return where a model came from, for its record: a repository, or ``./name`` for a local folder.

    No repository name begins like that, and the path of the folder is private.
    """
    name = loaded_from(model)
    return f"./{Path(name).resolve().name}" if name and Path(name).exists() else name


def read(config: PretrainedConfig) -> Record | None:
    """Return the record that a config carries, or None."""
    data = getattr(config, FIELD, None)
    return None if data is None else parse(data)
