"""Grouped-query and multi-query attention (Ainslie et al., 2305.13245; Shazeer, 1911.02150)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy, Site
from ..errors import AttnPatchError, CalibrationError, UnsupportedArchitecture
from ..functional.grouping import METHODS as PLAIN
from ..heads import calibration_text
from ..heads.calibration_text import Batch
from ..heads.conversion import Recipe, convert, unaligned
from ..heads.damage import DamageReport
from ..heads.group_size import choose
from ..heads.regroup import Source, foreign, native
from ..patch import Patch, Proposal, changed

ALIGNED = ("procrustes", "principal")  # need the weights only, and which dimensions are rotated
CALIBRATED = ("calibrated", "refined")  # need text
METHODS = (*PLAIN, *ALIGNED, *CALIBRATED)
SORTED = ("principal", *CALIBRATED)  # group similar heads by default
GROUPINGS = ("adjacent", "similar")


@dataclass(frozen=True, kw_only=True)
class GroupedQuery(Patch):
    """Grouped-query or multi-query attention (2305.13245, 1911.02150): query heads share key-value heads.

    The cache then holds ``num_kv_heads`` heads. Heads are merged, or replicated if the number grows, which leaves the
    logits unchanged. All but the first three methods also transform the queries and the output projection to fit the
    shared heads: see :mod:`hf_attnpatch.functional.merging`. If the family's config has a field for the number, the
    result is a stock model and a stock checkpoint. Otherwise (GPT-2, GPT-NeoX, OPT, GPT-J, BLOOM, MPT, BERT ...) the
    projections are replaced by shared ones and the cache becomes narrower; such a checkpoint loads once this package is
    imported.

    Args:
        num_kv_heads: key-value heads after the patch; a divisor of the query heads, and a divisor or multiple of the
            present number. ``"auto"`` takes the number that fits ``cache_target`` with the least predicted loss.
        method: how heads are merged. From the weights: ``first``; ``mean`` (Ainslie et al., section 2.1);
            ``mean_rescaled``, which restores row norms; ``procrustes``, which first rotates heads towards each other
            (Jin et al., 2412.20677); ``principal``, principal components of keys weighted by their queries and of
            values weighted by their output. From calibration text: ``calibrated``, the same with measured covariances
            and a refitted output projection; ``refined``, then improved layer by layer by gradient descent. The default
            is ``refined`` with calibration and ``principal`` without; ``mean`` if heads cannot be aligned, which the
            report says.
        grouping: ``adjacent`` heads share, or the most ``similar`` ones, whose merge keeps the most energy. The default
            is
            ``similar`` with ``principal``, ``calibrated`` and ``refined`` in modules whose heads can be reordered, and
            ``adjacent`` elsewhere.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``. About 64 sequences of 512 tokens of ordinary text suffice. ``"self"`` or :class:`OwnText`,
            alone or among them, is text that the model writes itself: no file is needed, and no domain is favoured.
        tokenizer: for strings in ``calibration``.
        seed: for the selection of refinement batches.
        refine_steps: steps of Adam for each layer.
        refine_seconds: time limit for the refinement of all layers together, in seconds.
        fallback: the data-free method to use if the calibration text is unusable (too short, activations not finite);
            None
            makes that an error.
        cache_target: for ``"auto"``: at most this share of the present cache (up to 1.0), or this many bytes per token
            (an int).

    Raises:
        UnsupportedArchitecture: no attention module with keys and values of its own (state-space, latent attention).
        CalibrationError: unusable calibration text.
        AttnPatchError: a number of heads that does not divide, an unknown method, or a method without its text.
    """

    name: ClassVar[str] = "grouped_query"
    transient: ClassVar[frozenset[str]] = frozenset({"calibration", "tokenizer", "refine_seconds", "cache_target"})

    hints: ClassVar[Mapping[str, str]] = {"factor": "num_kv_heads says how many heads are left, cache_target a share"}

    num_kv_heads: int | Literal["auto"]
    method: Literal["first", "mean", "mean_rescaled", "procrustes", "principal", "calibrated", "refined"] | None = None
    grouping: Literal["adjacent", "similar"] | None = None
    calibration: Any = field(default=None, compare=False, repr=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)
    seed: int = 0
    refine_steps: int = 150
    refine_seconds: float | None = None
    fallback: Literal["first", "mean", "mean_rescaled", "procrustes", "principal"] | None = None
    cache_target: float | int | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, (*METHODS, None))
        _one_of("grouping", self.grouping, (*GROUPINGS, None))
        _one_of("fallback", self.fallback, (*PLAIN, *ALIGNED, None))
        if (self.num_kv_heads == "auto") != (self.cache_target is not None):
            raise AttnPatchError(
                f"num_kv_heads={self.num_kv_heads!r} and cache_target={self.cache_target!r}: num_kv_heads='auto' and a "
                "cache_target (a share such as 0.25, or bytes per token) belong together; give both or neither."
            )
        if self.num_kv_heads != "auto":
            _count("num_kv_heads", self.num_kv_heads, 1)
        _count("refine_steps", self.refine_steps, 1)
        _count("seed", self.seed, 0)
        seconds = self.refine_seconds
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise AttnPatchError(f"refine_seconds is {seconds!r}; it must be a positive number or None.")
        if isinstance(self.calibration, Iterable) and not isinstance(self.calibration, (Tensor, str, Mapping)):
            self._normalise("calibration", tuple(self.calibration))  # "auto" reads it twice

    def to_record(self, finding: object = None) -> dict[str, Any]:
        """Return the JSON-able form, with the method and the grouping that were used; see :meth:`Patch.to_record`."""
        used = {"method": finding.method, "grouping": finding.grouping} if isinstance(finding, DamageReport) else {}
        return {**super().to_record(finding), **used}

    def structure(self) -> GroupedQuery:
        """Return the patch with the cheapest method; the shapes are the same."""
        return changed(self, method="first", grouping=None, calibration=None)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits of the projections; ``"auto"`` runs the model; see :meth:`Patch.propose`."""
        sites = _self_attention(model, anatomy)
        made, notes = self._decided(model, sites)
        for site in sites:
            made._check_count(site)
        n = made.num_kv_heads
        todo = [s for s in sites if s.num_kv_heads != n]
        if not todo:
            return Proposal(
                (), (), (*notes, f"already {n} key-value heads in all {len(sites)} modules; nothing to do"), patch=made
            )
        return made._proposal(model, anatomy, sites, todo, notes)

    def text(self, model: PreTrainedModel) -> list[Batch] | None:
        """Return the calibration text as checked batches of inputs; None if none was given."""
        given = self.calibration
        return None if given is None else calibration_text.batches(given, self.tokenizer, model)

    def _decided(self, model: PreTrainedModel, sites: list[Site]) -> tuple[GroupedQuery, list[str]]:
        """Resolve the open choices: the default method and grouping, and the automatic number of heads."""
        method, notes = self._method(model, sites)
        grouping = _grouping(self.grouping, method)
        made = changed(self, method=method, grouping=grouping)
        if self.num_kv_heads == "auto":
            text = self.text(model)
            if text is not None:
                calibration_text.check_amount(text, sites)
            count, why = choose(model, sites, self.cache_target, grouping, text)
            kept = None if text is None else tuple(text)  # read, or generated, once
            made, notes = changed(made, num_kv_heads=count, cache_target=None, calibration=kept), [*notes, why]
        return made, notes

    def _method(self, model: PreTrainedModel, sites: list[Site]) -> tuple[str, list[str]]:
        """Return the default method, and the reason if it is not the best one."""
        if self.method is not None or self.calibration is not None:
            return self.method or "refined", []
        merged = [s for s in sites if self.num_kv_heads == "auto" or s.num_kv_heads > self._n]
        why = unaligned(model, merged) if merged else None
        return ("principal", []) if why is None else ("mean", [f"method 'mean', as heads cannot be aligned: {why}"])

    def _proposal(
        self, model: PreTrainedModel, anatomy: Anatomy, sites: list[Site], todo: list[Site], notes: list[str]
    ) -> Proposal:
        merged = [s for s in todo if s.num_kv_heads > self._n]
        simple = self.method in PLAIN and self.calibration is None and self.grouping != "similar"
        converts = bool(merged) and not simple
        if converts:
            self._check_conversion(merged)
        source = Source(self._n, self.method if self.method in PLAIN else "first")
        found = native(model, todo, source, converts)
        stock = not isinstance(found, str)
        edits = list(foreign(model, anatomy, todo, source, found, converts)) if isinstance(found, str) else found
        notes += [f"not a stock checkpoint: {found}"] if isinstance(found, str) else []
        left = [s for s in anatomy.sites if s not in sites]
        if left:
            notes.append(f"left alone: {len(left)} cross-attention or tower modules, such as {left[0].path}")
        notes += [f"left alone: {why}" for why in dict.fromkeys(anatomy.other.values())]
        paths, prepare = tuple(s.path for s in todo), _Prepare(self, merged, source) if converts else None
        return Proposal(
            tuple(edits),
            paths,
            tuple(notes),
            stock=stock,
            preserves=not merged,
            patch=self,
            prepare=prepare,
            release=source.release,
        )

    @property
    def _n(self) -> int:
        assert isinstance(self.num_kv_heads, int)
        return self.num_kv_heads

    def _check_count(self, site: Site) -> None:
        n, kv = self._n, site.num_kv_heads
        fits = [m for m in range(1, site.num_heads + 1) if site.num_heads % m == 0 and (kv % m == 0 or m % kv == 0)]
        if n not in fits:
            raise AttnPatchError(
                f"{site.path}: {kv} key-value heads under {site.num_heads} query heads do not become {n}; "
                f"choose num_kv_heads from {', '.join(map(str, fits))}."
            )

    def _check_conversion(self, sites: list[Site]) -> None:
        if self.method in CALIBRATED and self.calibration is None:
            raise AttnPatchError(
                f"method {self.method!r} needs text; pass calibration=token ids, or a list of strings with tokenizer=; "
                "'principal' is the best method without."
            )
        blind = next((s for s in sites if not s.output), None)
        if blind is not None:
            raise UnsupportedArchitecture(
                f"{blind.path}: {blind.kind} has no output projection that could be adapted to shared values; use "
                f"method='mean' without calibration, which changes keys and values only."
            )


@dataclass(frozen=True)
class _Prepare:
    """Computes the shared weights that the edits will write."""

    patch: GroupedQuery
    sites: Sequence[Site]
    source: Source

    def __call__(self, model: PreTrainedModel) -> DamageReport:
        patch, method = self.patch, self.patch.method or ""
        notes: tuple[str, ...] = ()
        try:
            text = patch.text(model)
            if text is not None:
                calibration_text.check_amount(text, self.sites)
            done = convert(model, self.sites, self._recipe(method), text)
        except CalibrationError as error:
            if patch.fallback is None:
                raise
            method = patch.fallback
            done = convert(model, self.sites, self._recipe(method), None)
            notes = (f"fallback to {method}: {error}",)
        self.source.conversion = done
        layers = [done.layers[site.path] for site in self.sites]
        return DamageReport(layers, method, (*notes, *done.notes), done.seconds)

    def _recipe(self, method: str) -> Recipe:
        p = self.patch
        return Recipe(p._n, method, _grouping(p.grouping, method), p.seed, p.refine_steps, p.refine_seconds)


def _grouping(asked: str | None, method: str) -> str | None:
    """Return the default grouping of a method; None lets each module decide."""
    return asked or (None if method in SORTED else "adjacent")


def _one_of(field_: str, value: object, choices: Sequence[object]) -> None:
    if not isinstance(value, (str, type(None))) or value not in choices:
        known = ", ".join(str(c) for c in choices if c is not None)
        raise AttnPatchError(f"{field_} {value!r} does not exist; choose from: {known}.")


def _count(field_: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise AttnPatchError(f"{field_} is {value!r}; it must be a whole number, at least {least}.")


def _self_attention(model: PreTrainedModel, anatomy: Anatomy) -> list[Site]:
    """Return the attention modules to regroup, or refuse the model."""
    sites = [s for s in anatomy.sites if not s.cross and not s.tower]
    if anatomy.unread or not sites:
        path, why = next(iter((anatomy.unread or anatomy.other).items()), ("", "no module has key and value heads"))
        place = f"{path}: " if path else ""
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: grouped heads need self-attention with readable keys and values; {place}{why}."
        )
    owners: dict[int, Site] = {}
    for site in sites:
        weight = model.get_submodule(f"{site.path}.{site.layout.key}").weight
        first = owners.setdefault(id(weight), site)
        if first is not site:
            raise UnsupportedArchitecture(
                f"{site.path}: shares its weights with {first.path}; regrouping would untie them."
            )
    return sites
