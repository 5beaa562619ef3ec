"""The base of every patch: a frozen dataclass that is its own configuration."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import AttnPatchError
from .schema import brief, plain, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy
    from .edits import Edit

_LONGEST = 600  # characters of what a patch says of its fields
_PLAIN = (int, float, str, list, tuple, Mapping)
REGISTRY: dict[str, type[Patch]] = {}


@dataclass(frozen=True)
class Proposal:
    """What a patch would do to one model, before anything is done.

    Attributes:
        edits: the writes, in order.
        sites: paths of the attention modules whose behaviour changes; the self-check counts their calls.
        notes: sentences for the report: what was chosen and why, what is left alone.
        stock: whether a checkpoint of the result loads in transformers without this package.
        claims: what else is taken, beside what the edits touch; two patches with an equal claim are in conflict.
        preserves: whether the logits must stay what they were (up to rounding).
        patch: the patch with its open choices made (a default that depends on the model, "auto"); None if it had none.
        promise: is shown the cache of a text that the patched model has decoded, and says what is not as promised.
        release: lets go of what ``prepare`` made for the edits, once they are written: a report is kept for long.
        prepare: work that the edits need and a plan must not do (running the model over calibration text); called by
            ``apply`` on the untouched model before the first edit; returns what it found, for the report.
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


@dataclass(frozen=True, kw_only=True)
class Patch(ABC):
    """A method. Its fields are the hyper-parameters; ``propose`` says what it would do and touches nothing."""

    name: ClassVar[str]
    transient: ClassVar[frozenset[str]] = frozenset()  # fields that a record never holds (data, handles)
    changes_positions: ClassVar[bool] = False  # whether it changes what the model knows positions by
    wraps: ClassVar[bool] = False  # whether all it does is around attention, so that another may be put around it
    recorded: ClassVar[bool] = True  # False where a checkpoint has nothing to remember, as for a kernel choice

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.name] = cls

    @abstractmethod
    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which edits this patch would make.

        Raises:
            UnsupportedArchitecture: where the model has no place for it.
            AttnPatchError: where an argument does not fit this model.
        """

    def _normalise(self, name: str, value: Any) -> None:
        """Give one of its own fields its standard form while it is being made: YAML's list becomes a tuple, say."""
        object.__setattr__(self, name, value)

    def structure(self) -> Patch:
        """Return the patch that gives a fresh model the same modules without computing their weights."""
        return self

    def to_record(self, finding: object = None) -> dict[str, Any]:
        """Return the JSON-able form that a checkpoint keeps; ``finding`` is what ``prepare`` returned."""
        left = self.transient | internal_fields(type(self)).keys()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left}
        return {"patch": self.name, **fields}


class _Missing:
    """Stands where a field must be given, so that the patch itself says what it wants there."""

    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def required() -> Any:
    """Return a field that must be given: ``__post_init__`` finds what reads ``missing`` there, and refuses it."""
    return dataclasses.field(default=_MISSING)


def internal(default: Any = None) -> Any:
    """Return a field that the package fills in: no plan, no argument and no stranger's record may."""
    return dataclasses.field(default=default, repr=False, metadata={"internal": True})


def internal_fields(cls: type[Patch]) -> dict[str, Any]:
    """Return the names of such fields, with what stands in them otherwise."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.metadata.get("internal")}


def from_spec(spec: Mapping[str, Any], *, recorded: bool = False, trust_remote_code: bool = False) -> Patch:
    """Build a patch from ``{"patch": name, field: value, ...}``, the form of records, recipes and the command line.

    Args:
        spec: of the patch.
        recorded: whether it stands in a checkpoint's record, which holds no patch that leaves nothing to remember.
        trust_remote_code: whether it may name a repository of kernels, whose code would run.

    Raises:
        AttnPatchError: for an unknown patch or field, with the ones there are, or a field that is not for its giver.
    """
    known = ", ".join(sorted(_registered()))
    if not isinstance(spec, Mapping):
        raise AttnPatchError(f"a {type(spec).__name__} is no patch; give a mapping such as {{'patch': 'flash'}}.")
    name = spec.get("patch")
    if not isinstance(name, str) or name not in REGISTRY:
        raise AttnPatchError(f"patch {quoted(name)} does not exist; choose from: {known}.")
    cls = REGISTRY[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    choices = ", ".join(sorted(fields - set(internal_fields(cls))))
    _check_giver(cls, spec, recorded)
    _check_kernel(cls, spec, trust_remote_code)
    unknown = sorted(brief(key, 40) for key in set(spec) - fields - {"patch"})[:8]
    if unknown:
        raise AttnPatchError(f"{name}: no field {', '.join(unknown)}; its fields are: {choices}.")
    given = {key: value for key, value in spec.items() if key != "patch"}
    for key in given.keys() - cls.transient:  # those may be tensors and tokenizers
        if isinstance(given[key], _PLAIN):
            plain(given[key], f"{name}.{key}", finite=False)
    lacking = [f.name for f in dataclasses.fields(cls) if f.default is _MISSING and f.name not in given]
    try:
        return cls(**given)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of ours, or of Python's
        if isinstance(error, AttnPatchError) and not lacking and len(str(error)) <= _LONGEST:
            raise
        problem = brief(str(error).rstrip("."), _LONGEST)
        raise AttnPatchError(f"{name}: {problem}; its fields are: {choices}.") from error


def _registered() -> Mapping[str, type[Patch]]:
    importlib.import_module(f"{__package__}.patches")  # they register themselves, and nobody may have asked for one yet
    return REGISTRY


def _check_giver(cls: type[Patch], spec: Mapping[str, Any], recorded: bool) -> None:
    """Refuse what only the package fills in: a rotation that was given would be compared with itself."""
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


__all__ = ["REGISTRY", "Patch", "Proposal", "from_spec", "internal", "internal_fields", "off_default", "required"]


def off_default(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a patch in a record that a user may choose and that are not at their default."""
    cls = _registered()[spec["patch"]]
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in internal_fields(cls)}
    return {key: value for key, value in spec.items() if key in defaults and value != defaults[key]}
