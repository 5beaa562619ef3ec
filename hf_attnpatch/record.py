"""``config.attnpatch``: what was done to a model, versioned, carried by its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from .errors import AttnPatchError
from .patch import Patch, from_spec
from .schema import brief, fields_of, typed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIELD = "attnpatch"
VERSION = 1


@dataclass(frozen=True)
class Record:
    """The patches of a model, in the order they were applied.

    Attributes:
        patches: each as ``Patch.to_record`` gives it.
        base_model: repository that the model was loaded from, or ``./name`` of a folder; see :func:`source_of`.
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
        return [_patch_of(spec).structure() for spec in self.patches if not spec.get("stock")]


@dataclass(frozen=True)
class _Written:
    """A record as JSON has it; see :class:`Record`."""

    version: int
    patches: list[dict[str, Any]]
    base_model: str
    base_model_type: str
    stock: bool
    versions: dict[str, str]
    commands: list[str] = field(default_factory=list)


_MOST, _LONGEST = 64, 16_384  # entries of a list, characters of a text
_TYPE = re.compile(r"[\w.-]{1,64}", re.ASCII)
_PATH = re.compile(r"\w+(\.\w+)*|", re.ASCII)  # of a module
_WAYS = ("found", "turning")  # fields that say how modules turn their keys: module -> rotary, buffer, pairs, first
Way = tuple[str, str, bool, int]


def parse(data: object) -> Record:
    """Read a record, which a stranger may have written.

    Nothing in it is taken for a path of a file or for code. Patches are those that leave something to remember, with
    fields that a user could have chosen, and what was found out about modules by name, type and range.

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
    _check_sizes(found)
    for number, spec in enumerate(found.patches):
        where = f"config.{FIELD}.patches[{number}]"
        try:
            _patch_of(spec)
        except AttnPatchError as error:
            raise AttnPatchError(f"{where}: {brief(str(error), 400)}") from error
        for name in _WAYS:
            _check_ways(spec.get(name), f"{where}.{name}")
    return Record(
        tuple(found.patches),
        found.base_model,
        found.base_model_type,
        found.stock,
        found.versions,
        tuple(found.commands),
    )


def _check_sizes(found: _Written) -> None:
    for name in ("patches", "versions", "commands"):
        if len(getattr(found, name)) > _MOST:
            raise AttnPatchError(f"config.{FIELD}.{name} has {len(getattr(found, name))} entries, at most {_MOST}.")
    texts = (found.base_model, *found.commands, *found.versions, *found.versions.values())
    if any(len(text) > _LONGEST for text in texts):
        raise AttnPatchError(f"config.{FIELD}: a text of more than {_LONGEST} characters.")
    if not _TYPE.fullmatch(found.base_model_type):
        raise AttnPatchError(f"config.{FIELD}.base_model_type is {brief(found.base_model_type)}; wanted a model type.")


def _patch_of(spec: Mapping[str, Any]) -> Patch:
    """Return a patch of a record; what it found out is read by type, tuples being lists there."""
    if not isinstance(spec.get("stock", False), bool):
        raise AttnPatchError(f"stock is {brief(spec['stock'])}; it must be true or false.")
    return from_spec({key: value for key, value in spec.items() if key != "stock"}, recorded=True)


def _check_ways(value: object, where: str) -> None:
    """Hold what a record says of how modules turn their keys to names of modules and buffers, and to numbers."""
    ways: dict[str, Way | None] = typed(Mapping[str, Way | None] | None, value, where) or {}
    for path, way in ways.items():
        names = (path, *way[:2]) if way is not None else (path,)
        strange = next((name for name in names if not _PATH.fullmatch(name)), None)
        if strange is not None:
            raise AttnPatchError(f"{where}: {brief(strange)} is no name of a module or a buffer.")
        if way is not None and not 0 <= way[3] <= 1 << 16:
            raise AttnPatchError(f"{where}.{path}: {way[3]} is no dimension of a head.")


def located(model: PreTrainedModel, record: Record) -> Record:
    """Return a record whose names of modules are those of this model, which may be the trunk of the recorded one.

    Or a head on top of it: what stands below ``model.`` in a language model stands at the top of its trunk.
    """
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def there(path: str) -> str:
        other = path.removeprefix(prefix) if path.startswith(prefix) else prefix + path
        return other if path not in modules and other in modules else path

    def moved(spec: Mapping[str, Any]) -> Mapping[str, Any]:
        ways = {name: spec[name] for name in _WAYS if spec.get(name)}
        return {
            **spec,
            **{
                name: {there(path): way and [there(way[0]), *way[1:]] for path, way in found.items()}
                for name, found in ways.items()
            },
        }

    return replace(record, patches=tuple(map(moved, record.patches)))


def check_places(model: PreTrainedModel, record: Record) -> None:
    """Hold what a record says of modules to a model that has just been built by its config.

    Raises:
        AttnPatchError: a module is not there, or has no such buffer of frequencies.
    """
    modules = dict(model.named_modules())
    for spec in record.patches:
        for path, way in ((p, w) for name in _WAYS for p, w in (spec.get(name) or {}).items()):
            buffers = {} if way is None or way[0] not in modules else dict(modules[way[0]].named_buffers(recurse=False))
            if path not in modules or (way is not None and way[1] not in buffers):
                raise AttnPatchError(
                    f"config.{FIELD}: {spec['patch']} names {brief(path)} and {brief(str(way))}, which "
                    f"{type(model).__name__} does not have; the record is of another model, or was edited."
                )


def note_command(folder: Path, command: str) -> None:
    """Write the command line that made a saved checkpoint into the record of its config; without one, do nothing."""
    data = json.loads((folder / "config.json").read_text("utf-8")).get(FIELD)  # which save_pretrained has just written
    if data is not None:
        found = parse(data)
        rewrite(folder, replace(found, commands=(*found.commands, command)))


def rewrite(folder: Path, record: Record) -> None:
    """Put a record in the place of the one in a saved checkpoint's config."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text("utf-8")), FIELD: record.to_dict()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


# What a model is called that is not, or no longer, what lies under the name it was loaded by. An adapter trained on it
# (PEFT), or a trainer that wants a reference (TRL), names its base so; loading that is an error that quotes this, where
# the old name would give the unpatched model without a word. Plain text, as it is written into YAML.
IN_MEMORY = "patched in memory by hf_attnpatch: save_pretrained, load from there, and go on"
LOADED_FROM = "attnpatch_loaded_from"  # attribute of such a model


def loaded_from(model: PreTrainedModel) -> str:
    """Return the name or path that a model was loaded by, whether it was patched since; empty where it was built."""
    found = vars(model).get(LOADED_FROM) or getattr(model.config, "_name_or_path", None) or ""
    return str(found)


def source_of(model: PreTrainedModel) -> str:
    """Return where a model came from, for its record: a repository, or ``./name`` for a folder of this machine.

    No repository begins so, and where the folder lies is nobody's business.
    """
    name = loaded_from(model)
    return f"./{Path(name).resolve().name}" if name and Path(name).exists() else name


def read(config: PretrainedConfig) -> Record | None:
    """Return the record that a config carries, or None."""
    data = getattr(config, FIELD, None)
    return None if data is None else parse(data)
