"""The base of every patch: a frozen dataclass that is its own configuration."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import AttnPatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy
    from .edits import Edit

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


@dataclass(frozen=True, kw_only=True)
class Patch(ABC):
    """A method. Its fields are the hyper-parameters; ``propose`` says what it would do and touches nothing."""

    name: ClassVar[str]
    transient: ClassVar[frozenset[str]] = frozenset()  # fields that a record never holds (data, handles)
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
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.transient}
        return {"patch": self.name, **fields}


def from_spec(spec: Mapping[str, Any]) -> Patch:
    """Build a patch from ``{"patch": name, field: value, ...}``, the form of records, recipes and the command line.

    Raises:
        AttnPatchError: for an unknown patch or field, with the ones there are.
    """
    importlib.import_module(f"{__package__}.patches")  # they register themselves, and nobody may have asked for one yet
    known = ", ".join(sorted(REGISTRY))
    if not isinstance(spec, Mapping):
        raise AttnPatchError(f"a {type(spec).__name__} is no patch; give a mapping such as {{'patch': 'flash'}}.")
    name = spec.get("patch")
    if not isinstance(name, str) or name not in REGISTRY:
        raise AttnPatchError(f"patch {name!r} does not exist; choose from: {known}.")
    cls = REGISTRY[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(spec) - fields - {"patch"}))
    if unknown:
        raise AttnPatchError(f"{name}: no field {', '.join(unknown)}; its fields are: {', '.join(sorted(fields))}.")
    try:
        return cls(**{key: value for key, value in spec.items() if key != "patch"})
    except TypeError as error:  # a missing field: dataclasses say which
        raise AttnPatchError(f"{name}: {error}; its fields are: {', '.join(sorted(fields))}.") from error


__all__ = ["REGISTRY", "Patch", "Proposal", "from_spec"]


def off_default(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a spec or of a patch in a record that are not at their default, to show what was chosen."""
    fields = {key: value for key, value in spec.items() if key not in ("patch", "stock")}
    defaults = {f.name: f.default for f in dataclasses.fields(from_spec({"patch": spec["patch"], **fields}))}
    return {key: value for key, value in fields.items() if value != defaults[key]}
