"""The base of every patch: a frozen dataclass that is its own configuration."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from .errors import AttnPatchError
from .schema import brief, plain, quoted

P = TypeVar("P", bound="Patch")
Q = ParamSpec("Q")
R = TypeVar("R")

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy
    from .edits import Edit

_LONGEST = 600  # characters of a message about fields
_PLAIN = (int, float, str, list, tuple, Mapping)
REGISTRY: dict[str, type[Patch]] = {}
# Synonyms and names of earlier versions -> the one name of a field in all patches. They mean exactly the same; a name
# that a patch has itself takes precedence.
ALIASES = {
    **{"target": "target_length", "length": "target_length", "max_position_embeddings": "target_length"},
    **{"trained": "trained_length", "original_max_position_embeddings": "trained_length"},
    **{"scaling_factor": "factor", "rope_type": "kind", "rope_theta": "theta", "partial_rotary_factor": "partial"},
    **{"num_key_value_heads": "num_kv_heads", "num_groups": "num_kv_heads", "attn_implementation": "backend"},
    **{"window_size": "window", "window_length": "window", "group_size": "group", "mem_len": "memory_length"},
}


@dataclass(frozen=True)
class Proposal:
    """What a patch would do to one model.

    Attributes:
        edits: the writes, in order.
        sites: paths of the attention modules whose behaviour changes; the self-check counts their calls.
        notes: sentences for the report: what was chosen and why, what is left alone.
        stock: whether a checkpoint of the result loads in transformers without this package.
        claims: what else is taken, besides what the edits touch; two patches with an equal claim are in conflict.
        preserves: whether the logits must stay the same (up to rounding).
        patch: the patch with its open choices resolved (a default that depends on the model, "auto"); None without any.
        promise: is called with the cache of a text that the patched model decoded; returns what is wrong with it.
        release: frees what ``prepare`` made for the edits once they are written, since a report lives long.
        prepare: work that the edits need and a plan must not do (running the model on calibration text); ``apply``
            calls it on the untouched model before the first edit; returns its findings for the report.
    """

    edits: tuple[Edit, ...]
    sites: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stock: bool = True
    preserves: bool = False
    claims: tuple[str, ...] = ()
    patch: Patch | None = None
    promise: Callable[[Any], str | None] | None = None
    prepare: Callable[[PreTrainedModel], object] | None = None
    release: Callable[[], None] | None = None


class _Kind(ABCMeta):
    """Metaclass of patches: accepts synonyms of fields, and explains errors in them."""

    if not TYPE_CHECKING:  # type checkers read the dataclass itself

        def __call__(cls, *unnamed: Any, **fields: Any) -> Any:
            """Make a patch.

            Raises:
                AttnPatchError: a field is unknown, missing, given twice or without its name.
            """
            found = named(cls, unnamed, fields)
            try:
                return super().__call__(**found)
            except AttnPatchError as error:
                if not any(value is _MISSING for value in found.values()):
                    raise
                problem = str(error).removeprefix(f"{cls.name}: ").rstrip(".")
                raise AttnPatchError(f"{cls.name}: {problem}; {_choices(cls)}.") from error

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature by fields, for ``help`` and completion."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]  # of the dataclass
        return own.replace(parameters=list(own.parameters.values())[1:], return_annotation=own.empty)


@dataclass(frozen=True, kw_only=True)
class Patch(metaclass=_Kind):
    """A method. Its fields are the hyper-parameters; ``propose`` returns the edits and touches nothing."""

    name: ClassVar[str]
    experimental: ClassVar[bool] = False  # whether fields may still change between versions
    hints: ClassVar[Mapping[str, str]] = {}  # a field of other patches -> what to use here instead
    transient: ClassVar[frozenset[str]] = frozenset()  # fields that are never recorded (data, handles)
    changes_positions: ClassVar[bool] = False  # whether it changes how the model encodes positions
    wraps: ClassVar[bool] = False  # whether it only wraps attention, so that another may wrap it
    height: ClassVar[int] = 0  # 1 if it builds on positions, 2 if on everything around attention
    recorded: ClassVar[bool] = True  # False if a checkpoint does not depend on it, as for a kernel

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = Patch.__repr__  # type: ignore[method-assign]  # or a dataclass would write one with every field
        REGISTRY[cls.name] = cls

    def __repr__(self) -> str:
        """Return the Python expression, without fields at their default."""
        off = {name: getattr(self, name) for name, field in fields_of(type(self)).items() if field.repr}
        defaults = {name: field.default for name, field in fields_of(type(self)).items()}
        said = ", ".join(f"{name}={value!r}" for name, value in off.items() if value != defaults[name])
        return f"{type(self).__name__}({said})"

    @abstractmethod
    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that this patch would make. The model is only read, or probed and restored.

        Raises:
            UnsupportedArchitecture: the model has no place for it.
            AttnPatchError: an argument does not fit this model.
        """

    def _normalise(self, name: str, value: Any) -> None:
        """Set one of its own fields to its standard form during construction, such as a tuple for YAML's list."""
        object.__setattr__(self, name, value)

    def structure(self) -> Patch:
        """Return the patch that gives a fresh model the same modules, without computing weights or running it."""
        return changed(self, proved=True) if "proved" in internal_fields(type(self)) else self

    def to_record(self, finding: object = None) -> dict[str, Any]:
        """Return the JSON form for a checkpoint; ``finding`` is the result of ``prepare``."""
        left = self.transient | internal_fields(type(self)).keys()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left}
        lists = {name: list(value) for name, value in fields.items() if isinstance(value, tuple)}
        return {"patch": self.name, **fields, **lists}


class _Missing:
    """Default of a required field, so that the patch itself reports what it needs."""

    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def internal_fields(cls: type[Patch]) -> dict[str, Any]:
    """Return the fields that only the package sets, with their default values."""
    return {f.name: f.default for f in dataclasses.fields(cls) if not f.init}


def changed(patch: P, **values: Any) -> P:
    """Return a patch with other, validated values in some fields, including those that only the package sets.

    Use it instead of ``dataclasses.replace``, which resets those.
    """
    inner = internal_fields(type(patch))
    given = {f.name: getattr(patch, f.name) for f in dataclasses.fields(patch) if f.init}
    made = type(patch)(**{**given, **{name: value for name, value in values.items() if name not in inner}})
    return _filled(made, {name: values.get(name, getattr(patch, name)) for name in inner})


def decided(patch: Patch, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
    """Return the proposal of a patch whose open choice was just resolved, so that the choice is recorded."""
    found = patch.propose(model, anatomy)
    return dataclasses.replace(found, patch=found.patch or patch)


def _filled(patch: P, inner: Mapping[str, Any]) -> P:
    made = copy.copy(patch)
    for name, value in inner.items():
        made._normalise(name, value)
    return made


def fields_of(cls: type[Patch]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields that a user sets, by name and in order."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def named(cls: type[Patch], unnamed: tuple[Any, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a patch under the names of its fields.

    Raises:
        AttnPatchError: a field is unknown, given twice, without its name, or set by the package only.
    """
    known, found = fields_of(cls), dict[str, Any]()
    if unnamed:
        first = next(iter(known), None)
        form = f", as in {cls.__name__}({first}={brief(unnamed[0], 40)})" if first else ""
        raise AttnPatchError(f"{cls.name}: {brief(unnamed[0])} stands without a name; give fields by name{form}.")
    for name, value in fields.items():
        field = name if name in known else ALIASES.get(name, name)
        if field in internal_fields(cls):
            raise AttnPatchError(f"{cls.name}: {field} is found out by this package and never given; leave it out.")
        if field not in known:
            raise AttnPatchError(f"{cls.name}: no field {brief(name, 40)}{_nearest(cls, name)}; {_choices(cls)}.")
        if field in found:
            raise AttnPatchError(f"{cls.name}: {field} is given twice, once under another name; give it once.")
        found[field] = value
    lacking = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in found]
    return {**found, **dict.fromkeys(lacking, _MISSING)}  # the patch itself says what it wants there


def by_any_name(function: Callable[Q, R]) -> Callable[Q, R]:
    """Let ``patch_x(model, ...)`` accept every synonym that the patch accepts, and explain errors."""
    cls = REGISTRY[function.__name__.removeprefix("patch_")]

    @functools.wraps(function)
    def call(*args: Any, **fields: Any) -> R:
        model = {"model": fields.pop("model")} if "model" in fields else {}
        calling: Callable[..., R] = function
        return calling(*args[:1], **model, **named(cls, args[1:], fields))

    return call


def _choices(cls: type[Patch]) -> str:
    return f"its fields are: {', '.join(fields_of(cls)) or 'none'}"


def _nearest(cls: type[Patch], name: str) -> str:
    """Return a suggestion for an unknown field."""
    said = cls.hints.get(ALIASES.get(name, name))
    if said is not None:
        return f" ({said})"
    words = {**{field: field for field in fields_of(cls)}, **{a: f for a, f in ALIASES.items() if f in fields_of(cls)}}
    near = difflib.get_close_matches(brief(name, 40).lower(), words, n=1)
    return f" (did you mean {words[near[0]]}?)" if near else ""


def from_spec(spec: Mapping[str, Any], *, recorded: bool = False, trust_remote_code: bool = False) -> Patch:
    """Build a patch from ``{"patch": name, field: value, ...}``, the form of records, recipes and the command line.

    Args:
        spec: the mapping.
        recorded: whether it comes from a checkpoint's record, which holds no patch that leaves no trace.
        trust_remote_code: whether it may name a repository of kernels, whose code would run.

    Raises:
        AttnPatchError: an unknown patch or field, with the known ones, or a field that this caller may not set.
    """
    known = sorted(_registered())
    if not isinstance(spec, Mapping):
        raise AttnPatchError(f"a {type(spec).__name__} is no patch; give a mapping such as {{'patch': 'flash'}}.")
    name = spec.get("patch")
    if not isinstance(name, str) or name not in REGISTRY:
        near = difflib.get_close_matches(brief(name).lower().replace("-", "_"), known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise AttnPatchError(f"patch {quoted(name)} does not exist{meant}; choose from: {', '.join(known)}.")
    cls = REGISTRY[name]
    _check_giver(cls, spec, recorded)
    _check_kernel(cls, spec, trust_remote_code)
    strange = sorted(brief(key, 40) for key in spec if not isinstance(key, str))[:1]
    if strange:
        raise AttnPatchError(f"{name}: no field {strange[0]}; {_choices(cls)}.")
    given = {key: value for key, value in spec.items() if key != "patch" and key not in internal_fields(cls)}
    for key in spec.keys() - cls.transient - {"patch"}:  # those may be tensors and tokenizers
        if isinstance(spec[key], _PLAIN):
            plain(spec[key], f"{name}.{brief(key, 40)}", finite=False)
    try:
        return cls(**given)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of ours, or of Python's
        if isinstance(error, AttnPatchError) and len(str(error)) <= _LONGEST:
            raise
        problem = brief(str(error).rstrip("."), _LONGEST)
        raise AttnPatchError(f"{name}: {problem}; {_choices(cls)}.") from error


def _registered() -> Mapping[str, type[Patch]]:
    importlib.import_module(f"{__package__}.patches")  # they register themselves, and nobody may have asked for one yet
    return REGISTRY


def _check_giver(cls: type[Patch], spec: Mapping[str, Any], recorded: bool) -> None:
    """Refuse fields that only the package sets: a rotation that was given would be compared with itself."""
    if recorded and not cls.recorded:
        raise AttnPatchError(f"{cls.name}: stands in no record, for a checkpoint has nothing to remember of it.")
    for name, default in internal_fields(cls).items():
        if name in spec and spec[name] != default:
            raise AttnPatchError(f"{cls.name}: {name} is found out by this package and never given; leave it out.")


def _check_kernel(cls: type[Patch], spec: Mapping[str, Any], trusted: bool) -> None:
    backend = spec.get("backend")
    if isinstance(backend, str) and "/" in backend and not trusted:
        raise AttnPatchError(
            f"{cls.name}: backend {brief(backend)} is a repository whose code would run; choose another, or pass "
            f"trust_remote_code=True (--trust-remote-code), or build {cls.__name__}(backend=...) yourself."
        )


__all__ = [
    *("ALIASES", "REGISTRY", "Patch", "Proposal", "by_any_name", "changed", "decided", "fields_of"),
    *("from_spec", "internal_fields", "named", "off_default"),
]


def off_default(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user's fields of a recorded patch that differ from their defaults."""
    cls = _registered()[spec["patch"]]
    defaults = {name: field.default for name, field in fields_of(cls).items()}
    under = {key if key in defaults else ALIASES.get(key, key): value for key, value in spec.items()}
    return {key: value for key, value in under.items() if key in defaults and value != defaults[key]}
