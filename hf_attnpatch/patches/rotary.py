"""Rotary positions for any model, and another base or scaling for models that have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy, angle_table
from ..attention.rotation import KINDS, Rotation
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..homes.checks import checked_layers, named, rotary_alone
from ..homes.fitting import check_read, current, find
from ..layers import unrotated
from ..patch import Patch, Proposal, changed, decided
from ..positions.removal import check_blind, check_effect, removal, removed
from ..positions.rotating import attention_rotated, ignores_positions, rebased
from ..rope.fields import check_number, check_reach, factor_to
from ..weightless import runnable

_TRAINED = "original_max_position_embeddings"  # other parameters of a family (Ministral's) may depend on it
_SCHEME = frozenset(  # the fields of a base and a scaling
    "rope_type type rope_theta factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate "
    "low_freq_factor high_freq_factor long_factor short_factor long_mscale short_mscale".split()
)


@dataclass(frozen=True, kw_only=True)
class Rotary(Patch):
    """Rotary position embedding (RoPE, 2104.09864): rotates queries and keys by position, instead of the old positions.

    If the model has rotary modules built from its config, they get another base and kind, config and modules together,
    and stock transformers loads the result. Otherwise keys are rotated once, at their own position, when they enter the
    cache, and queries in a wrapper around the model's attention kernel; families that compute attention themselves
    (BLOOM, MPT, Falcon, GPT-J, CodeGen) use torch's fused kernel instead. Positions are the ``position_ids`` that reach
    attention, otherwise indices in the cache: only differences count, so that left padding changes nothing. Such
    checkpoints have this package's model type, and the model has to be fine-tuned. Another base in some layers, or
    rotation in layers that have none, needs a home: a stock type that holds the model bit for bit and can express it.

    Args:
        theta: base of the frequencies.
        kind: ``default``, ``linear``, ``yarn`` or ``llama3`` with its usual numbers; replaces an existing scaling.
            For other kinds, or to multiply a scaling, use ``patch_rope_scaling`` on top (rotary models only).
        factor: factor of the scaling, new context over old, at least 1; None takes 1.
        target_length: the same as a context in tokens, relative to the config's; give one of the two.
        partial: share of each head that is rotated; None keeps the model's, or takes all.
        interleaved: whether adjacent dimensions form a pair; None keeps the model's layout, or takes halves, as in
            Llama.
        layer_types: for models with rotary parameters per layer type: which get the base; None takes those that attend
            to
            the whole context.
        layers: indices of the layers that get the base (``kind="default"`` only); None takes those that rotate, or all
            if
            none does.
        home: for ``layers``, and for models whose layers do not rotate: the stock model type for the result, ``auto``
            for
            the first that fits, or None.

    Raises:
        UnsupportedArchitecture: the old positions cannot be removed, or attention cannot be reached.
        AttnPatchError: an argument is out of range, or fixed by the model's own rotary modules.
    """

    name: ClassVar[str] = "rotary"
    changes_positions: ClassVar[bool] = True
    wraps: ClassVar[bool] = True

    theta: float = 10000.0
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float | None = None
    target_length: int | None = None
    partial: float | None = None
    interleaved: bool | None = None
    layer_types: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    home: str | None = "auto"
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("theta", self.theta, at_least=1)
        check_reach(self.factor, self.target_length)
        if self.kind not in KINDS:
            raise AttnPatchError(f"kind {self.kind!r} does not exist; choose from: {', '.join(KINDS)}.")
        if self.kind == "default" and (self._factor != 1 or self.target_length is not None):
            given = "factor" if self.target_length is None else "target_length"
            raise AttnPatchError(f"{given} {getattr(self, given):g} belongs to kind='linear', 'yarn' or 'llama3'.")
        if self.partial is not None:
            check_number("partial", self.partial)
            if self.partial > 1:
                raise AttnPatchError(f"partial is {self.partial:g}; it is a share of each head, at most 1.")
        if self.layer_types is not None:
            if isinstance(self.layer_types, str) or not all(isinstance(each, str) for each in self.layer_types):
                raise AttnPatchError(f"layer_types is {self.layer_types!r}; give a list of names, or None.")
            self._normalise("layer_types", tuple(self.layer_types))
        self._normalise("layers", checked_layers(self.layers))
        named(self.home)
        if self.layers is not None and (self.kind != "default" or self.layer_types is not None):
            raise AttnPatchError("layers= sets a base for single layers; leave kind and layer_types out.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that replace the positions by rotation; see :meth:`Patch.propose`."""
        if self.layers is not None or self.home not in (None, "auto") or unrotated(model):
            return self._moved(model, anatomy)
        if self.target_length is not None and anatomy.max_positions:
            factor = factor_to(self.target_length, anatomy.max_positions)
            return decided(changed(self, factor=factor, target_length=None), model, anatomy)
        if anatomy.rotary or anatomy.stilled:
            return self._native(model, anatomy)
        if self.layer_types is not None:
            raise AttnPatchError(
                f"{anatomy.architecture}: layer_types are for models with rotary modules of their own."
            )
        rotation = self._rotation(model, anatomy)
        edits = attention_rotated(model, anatomy, rotation, False)
        if not self.proved:
            check_blind(model, anatomy, removal(model, anatomy))
        with runnable(model, following=True):
            counted = ignores_positions(model, anatomy, edits)
        edits = attention_rotated(model, anatomy, rotation, True) if counted else edits
        sites = anatomy.attending
        pairs = "neighbours" if rotation.interleaved else "halves"
        heads = anatomy.sites[0].head_dim
        what = f"rotates {rotation.rotary_dim} of {heads} dimensions ({pairs}), theta {self.theta:g}, {self._kind()}"
        notes = (*removed(anatomy), what, *(("positions are counted; others than from 0 up are refused",) * counted))
        return Proposal(edits, sites, notes, stock=False, claims=("the positions",))

    def _native(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Rebuild the model's own rotary modules and remove its other positions."""
        if self.interleaved is not None:
            raise AttnPatchError(
                f"{anatomy.architecture}: its own modules fix which dimensions are paired; leave None."
            )
        own_alibi = anatomy.alibi and not anatomy.biased  # Falcon's, which the config switches off
        others = dataclasses.replace(anatomy, rotary=(), alibi=anatomy.alibi and not own_alibi)
        away = removal(model, others)
        layer_types = None if self.layer_types is None else tuple(self.layer_types)
        edits, notes = rebased(model, anatomy, self._parameters, layer_types, self.partial)
        if not edits and not away:
            return Proposal((), (), ("the model rotates so already",), preserves=True)
        stock = not away and not anatomy.stilled
        sites = anatomy.attending
        gone = removed(others) if away else ("its bias by distance is switched off",) * own_alibi
        said = (*gone, f"theta {self.theta:g}, {self._kind()}", *notes)
        if not self.proved and (away or own_alibi):
            check_effect(model, anatomy, (*away, *edits))
        return Proposal((*away, *edits), sites, said, stock=stock, claims=("the positions",))

    def _moved(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Move the model to, or keep it in, a type with a base for each layer."""
        if self.home is None or self.kind != "default" or self.partial is not None or self.interleaved is not None:
            raise AttnPatchError(
                f"{anatomy.architecture}: only a stock type can express a base for single layers, or where no layer "
                f"rotates: "
                "give theta and home, and no kind, partial or interleaved."
            )
        if not anatomy.stilled:
            rotary_alone(anatomy)
        now = current(model)
        turning = tuple(n for n, base in enumerate(now.bases) if base is not None) or None
        wanted = now.rotated(float(self.theta), self.layers or turning)
        if wanted == now:
            check_read(model, now)
            return Proposal((), (), ("the model rotates so already",), preserves=True)
        found = find(model, wanted, self.home)
        moved = sum(a != b for a, b in zip(now.bases, wanted.bases, strict=True))
        said = (f"theta {self.theta:g} in {moved} of {len(now.bases)} layers", *found.notes)
        chosen = changed(self, home=found.home.model_type)
        return Proposal((found.edit,), anatomy.attending, said, claims=("the positions",), patch=chosen)

    def _parameters(self, old: Mapping[str, Any], trained: int | None) -> dict[str, Any]:
        """Return transformers' parameters for the new base and kind; fields of the model itself are kept."""
        own = {key: value for key, value in old.items() if key not in (*_SCHEME, "partial_rotary_factor", _TRAINED)}
        kept = {key: old[key] for key in ("partial_rotary_factor", *((_TRAINED,) if own else ())) if key in old}
        new: dict[str, Any] = {**own, **kept, "rope_type": self.kind, "rope_theta": float(self.theta)}
        if self.kind == "default":
            return new
        if trained is None:
            raise AttnPatchError(
                f"kind={self.kind!r} needs a context length to multiply, and the config declares none."
            )
        numbers = {
            "linear": {},
            "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, _TRAINED: trained},
            "llama3": {
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                _TRAINED: trained,
            },
        }
        return {**new, "factor": self._factor, **numbers[self.kind]}

    def _rotation(self, model: PreTrainedModel, anatomy: Anatomy) -> Rotation:
        """Return how the heads will be rotated."""
        heads = {site.head_dim for site in anatomy.sites if not site.cross and not site.tower}
        if not heads:
            unread = next(iter((anatomy.unread | anatomy.other).items()), ("", ""))  # type: ignore[operator]
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: no attention module was read whose heads could be rotated. "
                + ": ".join(filter(None, unread))
            )
        if len(heads) != 1:
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: heads of {', '.join(map(str, sorted(heads)))} dimensions; "
                "one rotation needs heads of one size."
            )
        width = heads.pop()
        tables = ((module, angle_table(module)) for module in model.modules())  # including those fixed at position 0
        inner = [getattr(module, name) for module, name in tables if name is not None]
        own = inner[0].shape[-1] / width if inner else 1.0
        rotary_dim = int(width * (own if self.partial is None else self.partial))
        if rotary_dim < 2 or rotary_dim % 2:
            raise AttnPatchError(
                f"partial {self.partial:g} of a head of {width} is {rotary_dim} dimensions; it must be an even number."
                if self.partial is not None
                else f"{anatomy.architecture}: heads of {width} dimensions, which do not make pairs; choose partial."
            )
        if self.kind != "default" and not anatomy.max_positions:
            raise AttnPatchError(
                f"kind={self.kind!r} needs a context length to multiply, and the config declares none."
            )
        pairs = bool(inner) if self.interleaved is None else self.interleaved
        scaling = (self.kind, self._factor, anatomy.max_positions or 0)
        return Rotation(float(self.theta), rotary_dim, pairs, *scaling)

    @property
    def _factor(self) -> float:
        return 1.0 if self.factor is None else float(self.factor)

    def _kind(self) -> str:
        return self.kind if self.kind == "default" else f"{self.kind} by {self._factor:g}"
