"""Full attention to windows, in all layers or in those that lose least by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..heads import calibration_text
from ..homes.checks import checked_layers, named, rotary_alone
from ..homes.fitting import Found, current, find
from ..homes.rows import HOMES
from ..layers import Layers
from ..patch import Patch, Proposal, changed
from ..windows import choice, sinks
from ..windows.report import WindowReport

_WITH_SINKS = next(row.model_type for row in HOMES if row.fills)
_LONGEST = 8192  # tokens of a row that strings are cut into


@dataclass(frozen=True, kw_only=True)
class Windowed(Patch):
    """Sliding windows in the place of full attention, in all layers or in some (hybrids; KL-guided: 2512.20569).

    A layer with a window keeps the last ``window`` tokens in its cache, and no more. The model becomes a stock type
    with ``layer_types``, or stays what it is where its own type has them: transformers, and the engines that the report
    names, load the checkpoint without this package and allocate its cache by window.

    Which layers lose least is measured on text: the divergence of the logits with a window on one layer at a time, then
    as few layers as ``cache_target`` takes. Pretrained heads rest on a text's first tokens (2309.17453), which a window
    loses. With text, and a type that has learned sinks (``granite_swa``), sinks stand for them: in closed form from the
    scores of the first tokens, then refined layer by layer towards each module's own output. A model with sinks is run
    by :class:`Flash` at a flash kernel's speed; transformers alone computes it eagerly.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        window: last tokens that a layer sees, the query's own among them.
        layers: numbers of the layers that get a window, from 0; None for all; ``"auto"`` for those that lose least.
        cache_target: for ``"auto"``: the share of the cache that is to be left at the length of the model's context.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``; rows longer than the window, several times as long to be good. The first row is held out.
        tokenizer: for strings.
        first_tokens: how many first tokens sinks stand for, where there is text and a home with sinks; 0 for no sinks.
        refine_steps: of Adam, for each layer's sinks; 0 leaves the closed form.
        home: stock model type that is to hold the model: ``auto`` takes ``granite_swa`` where sinks are wanted, else
            the model's own type if it can say windows, else the first that fits; a name takes that one.

    Raises:
        UnsupportedArchitecture: no stock type can say this of the model.
        CalibrationError: text too short for the window.
        AttnPatchError: a window no shorter than the context, layers that are not there, an argument out of range.
    """

    name: ClassVar[str] = "windowed"
    experimental: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"calibration", "tokenizer", "cache_target", "refine_steps"})
    hints: ClassVar[Mapping[str, str]] = {"num_sinks": "first_tokens says for how many first tokens sinks stand"}

    window: int
    layers: Literal["auto"] | Sequence[int] | None = None
    cache_target: float | None = None
    calibration: Any = field(default=None, compare=False, repr=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)
    first_tokens: int = 4
    refine_steps: int = 60
    home: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("first_tokens", 0), ("refine_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnPatchError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
        if isinstance(self.layers, str) and self.layers != "auto":
            raise AttnPatchError(
                f"layers is {self.layers!r}; give layer numbers such as [0, 2], None for all, or 'auto'."
            )
        if self.layers != "auto":
            self._normalise("layers", checked_layers(self.layers))
        target = self.cache_target
        if (self.layers == "auto") != (target is not None):
            raise AttnPatchError(
                f"layers={self.layers!r} and cache_target={target!r}: layers='auto' and a cache_target, the share of "
                "the cache that is left, such as 0.5, belong together; give both or neither."
            )
        if target is not None and not (isinstance(target, float) and 0 < target < 1):
            raise AttnPatchError(f"cache_target is {target!r}; it must be a share between 0 and 1.")
        if self.layers == "auto" and self.calibration is None:
            raise AttnPatchError(
                "layers='auto' needs text to choose by; pass calibration=token ids, or strings with tokenizer=."
            )
        if self.home is None:
            raise AttnPatchError("home is None; windows need a stock type that has them: choose auto.")
        named(self.home)

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say which layers would get a window, and which type the model would become; ``"auto"`` runs the model."""
        rotary_alone(anatomy)
        now, paths = current(model), anatomy.attending
        context = self._context(anatomy)
        if len(paths) != len(now.windows):
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: {len(paths)} attention modules in {len(now.windows)} layers; which is which "
                "is not known."
            )
        rows = self._rows(model)
        candidates = tuple(n for n, width in enumerate(now.windows) if width is None)
        costs: list[float] = []
        if self.layers == "auto":
            if not candidates:
                raise UnsupportedArchitecture(f"{anatomy.architecture}: every layer has a window already.")
            costs = choice.costs(model, paths, self.window, rows)
            open_ = [cost if n in candidates else None for n, cost in enumerate(costs)]
            layers: Sequence[int] = choice.chosen(open_, self.window, context, float(self.cache_target or 1))
        else:
            layers = candidates if self.layers is None else tuple(int(n) for n in self.layers)
        wanted = now.windowed(self.window, layers)
        if wanted == now:
            return Proposal((), (), ("these layers see no more already",), preserves=True)
        found, why = self._home(model, now, wanted, bool(rows))
        first = self.first_tokens if self._sinks(found, model, rows) else 0
        made = changed(
            self,
            layers=tuple(layers),
            cache_target=None,
            calibration=None,
            home=found.home.model_type if found.home in HOMES else "auto",  # its own, which is no home of others
            first_tokens=first,
        )
        share = sum(min(w or context, context) for w in wanted.windows) / (context * len(wanted.windows))
        said = WindowReport(paths, self.window, tuple(layers), tuple(costs), first_tokens=first, share=share)
        prepare = _Prepare(said, rows, anatomy, self.refine_steps)
        edit = dataclasses.replace(found.edit, make=prepare.around(found.edit.make))
        notes = (said._in_short(), f"{share:.3g} of the cache is left at {context} tokens", *why, *found.notes)
        return Proposal(
            (edit,), paths, notes, claims=("the windows",), patch=made, prepare=prepare, release=prepare.release
        )

    def _context(self, anatomy: Anatomy) -> int:
        """Return the context that the model declares.

        Raises:
            AttnPatchError: the window is no shorter.
        """
        if not isinstance(anatomy.max_positions, int):
            raise UnsupportedArchitecture(f"{anatomy.architecture}: declares no context to be longer than a window.")
        if self.window >= anatomy.max_positions:
            raise AttnPatchError(
                f"window is {self.window}, and the model's context {anatomy.max_positions} tokens; a window that is no "
                "shorter changes nothing: choose a shorter one."
            )
        return anatomy.max_positions

    def _rows(self, model: PreTrainedModel) -> list[Tensor]:
        if self.calibration is None:
            return []
        text = calibration_text.batches(self.calibration, self.tokenizer, model, _LONGEST)
        return choice.rows_of(text, self.window)

    def _home(self, model: PreTrainedModel, now: Layers, wanted: Layers, text: bool) -> tuple[Found, tuple[str, ...]]:
        """Return the type that is to hold the model, and why it has no sinks where they were wanted."""
        if self.home != "auto" or not text or not self.first_tokens:
            return find(model, wanted, self.home, kinds=True), ()
        try:
            return find(model, wanted, _WITH_SINKS, kinds=True), ()
        except UnsupportedArchitecture as error:
            return find(model, wanted, "auto", kinds=True), (f"no sinks for the first tokens: {error}",)

    def _sinks(self, found: Found, model: PreTrainedModel, rows: Sequence[Tensor]) -> bool:
        """Whether the home has sinks that the model has not had."""
        own = any(name.endswith(tuple(found.home.fills)) for name, _ in model.named_parameters())
        return bool(found.home.fills) and not own and bool(rows) and self.first_tokens > 0


class _Prepare:
    """Works out the sinks, for the edit to write."""

    def __init__(self, said: WindowReport, rows: Sequence[Tensor], anatomy: Anatomy, steps: int):
        self.said, self.rows, self.anatomy, self.steps = said, rows, anatomy, steps
        self.found: dict[str, Tensor] = {}

    def __call__(self, model: PreTrainedModel) -> WindowReport:
        said = self.said
        if not said.first_tokens:
            return said
        paths = [said.paths[n] for n in said.layers]
        rows = [row for row in self.rows if len(row) >= said.window + said.first_tokens]
        closed = sinks.find(model, paths, said.window, said.first_tokens, rows)
        sites = {site.path: site for site in self.anatomy.sites}
        ready = [sites[path] for path in paths]
        self.found, gaps = sinks.refined(model, ready, said.window, closed, rows, self.steps)
        return dataclasses.replace(said, gaps={n: gaps[said.paths[n]] for n in said.layers})

    def around(self, make: Any) -> Any:
        """Return what builds the model of the other type, with these sinks in it."""

        def made(live: PreTrainedModel) -> PreTrainedModel:
            other: PreTrainedModel = make(live)
            for path, values in self.found.items():
                with torch.no_grad():
                    held: Any = other.get_submodule(path).sinks
                    held.copy_(values)
            return other

        return made

    def release(self) -> None:
        """Let go of the text and the sinks, once they are written."""
        self.rows, self.found = (), {}
