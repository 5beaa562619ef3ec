"""``config.attnpatch``: what was done to a model, versioned, carried by its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from .errors import AttnPatchError
from .patch import Patch, from_spec

FIELD = "attnpatch"
VERSION = 1


@dataclass(frozen=True)
class Record:
    """The patches of a model, in the order they were applied.

    Attributes:
        patches: each as ``Patch.to_record`` gives it.
        base_model: name or path that the model was loaded from.
        base_model_type: transformers' model type underneath.
        stock: whether transformers alone loads the checkpoint.
        versions: of this package and of transformers when it was written.
        commands: command lines that made the checkpoint, in order; empty where a script did.
    """

    patches: tuple[Mapping[str, Any], ...]
    base_model: str
    base_model_type: str
    stock: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        commands = {"commands": list(self.commands)} if self.commands else {}
        return {
            "version": VERSION,
            "patches": [dict(p) for p in self.patches],
            "base_model": self.base_model,
            "base_model_type": self.base_model_type,
            "stock": self.stock,
            "versions": dict(self.versions),
            **commands,
        }

    def restore(self) -> list[Patch]:
        """Return the patches whose structure the config alone does not give; their weights come from the checkpoint."""
        own = ({k: v for k, v in spec.items() if k != "stock"} for spec in self.patches if not spec.get("stock"))
        return [from_spec(spec).structure() for spec in own]


_SCHEMA: dict[str, type] = {"patches": list, "base_model": str, "base_model_type": str, "stock": bool, "versions": dict}


def parse(data: object) -> Record:
    """Read a record.

    Raises:
        AttnPatchError: a field is missing or of the wrong type, or a newer version wrote it.
    """
    if not isinstance(data, Mapping):
        raise AttnPatchError(f"config.{FIELD} is {type(data).__name__}; it must be the mapping this package writes.")
    version = data.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise AttnPatchError(
            f"config.{FIELD}.version is {version!r}; this release reads 1 to {VERSION}; upgrade hf_attnpatch."
        )
    for name, kind in _SCHEMA.items():
        if not isinstance(data.get(name), kind):
            found = type(data.get(name)).__name__
            raise AttnPatchError(
                f"config.{FIELD}.{name} is {found}; it must be a {kind.__name__}. The file was edited."
            )
    for i, spec in enumerate(data["patches"]):
        if not isinstance(spec, Mapping):
            raise AttnPatchError(f"config.{FIELD}.patches[{i}] is {type(spec).__name__}; it must be a mapping.")
    commands = data.get("commands", [])
    if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
        raise AttnPatchError(f"config.{FIELD}.commands is {commands!r:.80}; it must be a list of strings.")
    fields = {**{name: data[name] for name in _SCHEMA}, "patches": tuple(data["patches"])}
    return Record(**fields, commands=tuple(commands))


def note_command(folder: Path, command: str) -> None:
    """Write the command line that made a saved checkpoint into the record of its config; without one, do nothing."""
    data = json.loads((folder / "config.json").read_text("utf-8")).get(FIELD)
    if data is not None:
        found = parse(data)
        rewrite(folder, replace(found, commands=(*found.commands, command)))


def rewrite(folder: Path, record: Record) -> None:
    """Put a record in the place of the one in a saved checkpoint's config."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text("utf-8")), FIELD: record.to_dict()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def read(config: PretrainedConfig) -> Record | None:
    """Return the record that a config carries, or None."""
    data = getattr(config, FIELD, None)
    return None if data is None else parse(data)
