"""Asks the installed transformers what it reads of a config: a model is built from it and run, all on the meta device.

Every read of a field is noted, by the name that the file has for it, where the reader is modelling code and not the
config's own housekeeping. So nothing here is a list of what transformers reads; the next release is asked again.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint import auto_class
from ..configs import building
from ..errors import AttnPatchError
from ..foreign import MODEL_TYPE
from .text import clean
from .trial import CRASHES

_REFUSALS = (*CRASHES, StrictDataclassError)
# modules of transformers that read a config to compute; what builds, saves or prints configs reads all of it
_COMPUTE = (
    *("transformers.models.", "transformers.modeling_", "transformers.masking_utils", "transformers.cache_utils"),
    "transformers.integrations.",
)
_Reads = defaultdict[str, set[str]]  # field -> modules that read it
_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Answer:
    """What transformers reads from a config file.

    Attributes:
        reads: dotted name of a field of the built config, those in dictionaries included -> modules that read it.
        becomes: field of the file -> other fields of the built config that are different without it.
        kept: fields of the file that the built config has, under the same name and with the same value.
        needed: fields of the file without which there is no config.
        ran: whether a forward was run, beside building the model; some fields are read only then.
    """

    reads: Mapping[str, frozenset[str]]
    becomes: Mapping[str, tuple[str, ...]]
    kept: frozenset[str]
    needed: frozenset[str]
    ran: bool

    def reader_of(self, field: str) -> tuple[str, ...]:
        """Return the names under which a field of the file is read: its own, its new one, or none."""
        own = (field,) if field in self.needed or (field in self.kept and self._is_read(field)) else ()
        return (*own, *(name for name in self.becomes.get(field, ()) if self._is_read(name)))

    def _is_read(self, name: str) -> bool:
        return name in self.reads or any(other.startswith(f"{name}.") for other in self.reads)


def config_of(raw: Mapping[str, Any], where: str) -> PretrainedConfig:
    """Return the config object that transformers builds from a config file; no code of a checkpoint runs.

    Raises:
        AttnPatchError: a family that the installed release does not know, or values that it refuses.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not (kind == MODEL_TYPE or kind in CONFIG_MAPPING):
        remote = "its code stands in the checkpoint, and is not run here; " if raw.get("auto_map") else ""
        raise AttnPatchError(
            f"{where}: model_type is {kind!r}, which transformers {transformers.__version__} does not know; {remote}"
            "the doctor reads families that transformers has."
        )
    try:
        found: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(raw)))
    except AttnPatchError:
        raise
    except _REFUSALS as error:
        raise _refused(where, error) from error
    return found


def ask(raw: Mapping[str, Any], where: str) -> Answer:
    """Return which fields of a config file the installed transformers reads.

    Raises:
        AttnPatchError: it knows no such family, refuses a value, or can build no model from it.
    """
    whole = config_of(raw, where)
    built = _flat(whole.to_dict())
    given = _flat(raw)
    becomes, needed = {}, set()
    for field in fields(raw):
        try:
            other = _flat(config_of(without(raw, field), where).to_dict())
        except AttnPatchError:
            needed.add(field)
            continue
        changed = [n for n in {*built, *other} if built.get(n, _NONE) != other.get(n, _NONE)]
        becomes[field] = tuple(sorted(n for n in changed if n != field and not n.startswith(f"{field}.")))
    kept = frozenset(f for f in fields(raw) if _same(f, given, built))
    reads, ran = _reads(whole, where)
    return Answer(reads, becomes, kept, frozenset(needed), ran)


def computed(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return everything that a model takes from its config besides weights: buffers (including angles) and attributes.

    Raises:
        AttnPatchError: transformers builds no model from it.
    """
    found: dict[str, Any] = {}
    for path, module in _skeleton(config_of(raw, where), where).named_modules():
        found |= {f"{path}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
        plain = {n: v for n, v in vars(module).items() if isinstance(v, _PLAIN) and not n.startswith("_")}
        found |= {f"{path}.{name}": value for name, value in plain.items()}
    return found


def first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the name of something in which two results of :func:`computed` differ by a bit, or None."""
    for name in sorted({*before, *after}):
        old, new = before.get(name, _NONE), after.get(name, _NONE)
        tensors = isinstance(old, Tensor) and isinstance(new, Tensor)
        if not (torch.equal(old, new) if tensors else type(old) is type(new) and old == new):
            return name
    return None


def _skeleton(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """Return the model of a config: parameters without data, buffers with data."""
    try:
        with building(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    except AttnPatchError:
        raise
    except _REFUSALS as error:
        raise _refused(where, error) from error
    return model.eval()


def _reads(config: PretrainedConfig, where: str) -> tuple[dict[str, frozenset[str]], bool]:
    """Build and run a model from a config that records its readers; return fields and readers, and whether it ran."""
    model_class = type(_skeleton(copy.deepcopy(config), where))
    model_class = getattr(model_class, "unpatched", model_class)
    reads: _Reads = defaultdict(set)
    noted = _noting(copy.deepcopy(config), "", reads)
    try:
        with building(), torch.device("meta"):
            model = model_class(noted).eval()
    except _REFUSALS as error:
        raise _refused(where, error) from error
    try:
        with torch.no_grad():
            model(torch.zeros(1, 4, dtype=torch.long, device="meta"))
        ran = True
    except _REFUSALS:  # some forwards look at values, which a tensor without data has not
        ran = False
    return {name: frozenset(modules) for name, modules in reads.items()}, ran


def _noting(config: PretrainedConfig, prefix: str, reads: _Reads) -> PretrainedConfig:
    """Make a config, and its nested ones, record which fields modelling code reads."""
    base: Any = type(config)
    names = dict(getattr(base, "attribute_map", {}))

    def __getattribute__(self: Any, name: str) -> Any:
        if not name.startswith("_") and (name in names or name in vars(self)):
            _note(sys._getframe(1), prefix + names.get(name, name), reads)
        return base.__getattribute__(self, name)

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _noting(value, f"{prefix}{name}.", reads)
        elif isinstance(value, dict):
            vars(config)[name] = _Noting(value, f"{prefix}{name}.", reads)
    body = {"__getattribute__": __getattribute__, "__module__": base.__module__}
    config.__class__ = type.__new__(type(base), base.__name__, (base,), body)
    return config


class _Noting(dict[str, Any]):
    """A dictionary that records which keys modelling code reads."""

    def __init__(self, content: Mapping[str, Any], prefix: str, reads: _Reads):
        inner = {k: _Noting(v, f"{prefix}{k}.", reads) if isinstance(v, dict) else v for k, v in content.items()}
        super().__init__(inner)
        self._prefix, self._reads = prefix, reads

    def __getitem__(self, key: str) -> Any:
        _note(sys._getframe(1), f"{self._prefix}{key}", self._reads)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as a dictionary does, and record the key if it exists."""
        if key in self:
            _note(sys._getframe(1), f"{self._prefix}{key}", self._reads)
        return super().get(key, default)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(super(_Noting, self).__getitem__(key), memo) for key in self}


def _note(frame: FrameType, field: str, reads: _Reads) -> None:
    """Record that a frame reads a field, if it belongs to code that computes and is not a method of a config."""
    module = str(frame.f_globals.get("__name__", ""))
    computes = module.startswith(_COMPUTE) and ".configuration_" not in module
    if computes and not isinstance(frame.f_locals.get("self"), PretrainedConfig):
        reads[field].add(module.rpartition(".")[2])


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NONE = _Nothing()


def fields(raw: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a file's fields: configs and dictionaries in it, and what they contain."""
    for name, value in raw.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from fields(value, f"{prefix}{name}.")


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def without(raw: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return a file's fields without the one of this dotted name."""
    name, _, rest = field.partition(".")
    if not rest:
        return {key: value for key, value in raw.items() if key != name}
    return {key: without(value, rest) if key == name else value for key, value in raw.items()}


def _same(field: str, given: Mapping[str, Any], built: Mapping[str, Any]) -> bool:
    inner = [name for name in given if name == field or name.startswith(f"{field}.")]
    return bool(inner) and all(given[name] == built.get(name, _NONE) for name in inner)


def _refused(where: str, error: BaseException) -> AttnPatchError:
    version = transformers.__version__
    return AttnPatchError(
        f"{where}: transformers {version} builds nothing from it: {type(error).__name__}: {clean(str(error))}"
    )
