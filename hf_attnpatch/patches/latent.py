"""Multi-head latent attention (DeepSeek-V2, 2405.04434) out of grouped or multi-head attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..errors import AttnPatchError
from ..heads import calibration_text
from ..heads.calibration_text import Batch
from ..heads.damage import DamageReport
from ..latent.becoming import Weights
from ..latent.conversion import Budget, How, convert
from ..latent.home import check_name, find_home, keeps
from ..latent.shape import LEAST
from ..latent.source import Source, read_source
from ..patch import Patch, Proposal, changed

METHODS = ("principal", "calibrated", "refined")
_TEXT = "calibration=token ids, a list of strings with tokenizer=, or 'self', for text that the model writes itself"


@dataclass(frozen=True, kw_only=True)
class Latent(Patch):
    """Multi-head latent attention (MLA; DeepSeek-V2, 2405.04434): one latent and one rotary key serve all heads.

    The cache then holds ``rank + rope_dim`` numbers a token and layer. The model becomes a stock one (``youtu``, or a
    ``deepseek_v3`` without experts), and so does its checkpoint. Without a budget nothing is lost: every plane of every
    key head goes into the rotary key, all values into the latent; the frequencies, repeats included, are written as
    LongRoPE factors, and a constant channel of the latent keeps its norm from doing anything. With a budget, the
    components of keys that lose most without their rotation stay rotated (TransMLA, 2502.07864, keeps one of each
    frequency), and the rest of the keys is compressed together with the values.

    Experimental: its fields may get other names or defaults between minor versions.

    Args:
        rank: width of the latent, the constant channel included; with ``rope_dim``.
        rope_dim: width of the rotary key, an even number; with ``rank``, or with ``cache_target``, which leaves the
            rest to the latent. By default the best of three shares of the budget, as tried on the text.
        cache_target: at most this share of the present cache (a float), or this many bytes per token (an int).
        method: how a budget is met. ``principal``: from the weights, as if attention fell with the distance.
            ``calibrated``: from covariances and attention on text; then output projections are refitted. ``refined``,
            the default: then improved layer by layer by gradient descent.
        calibration: token ids (sequences, length), an iterable of dictionaries of model inputs, or strings with
            ``tokenizer``; ``"self"`` or :class:`OwnText` for text that the model writes. Some 64 sequences of 512 do.
        tokenizer: for strings.
        seed: of the order of the text.
        refine_steps: of Adam, for each layer.
        refine_seconds: stops refinement of a layer early, so that all layers together take about so long.
        grade: ``exact``: transformers reads the checkpoint. Other engines take no bias before the latent and no table
            of frequencies.
        home: stock model type that is to hold the model; ``auto`` for the first that fits.

    Raises:
        UnsupportedArchitecture: q/k norms, windows, partial rotary, frequencies that change with the length, or layers
            that are not those of a Llama.
        CalibrationError: unusable calibration text.
        AttnPatchError: a budget that is too small, or a method that lacks its text.
    """

    name: ClassVar[str] = "latent"
    experimental: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"calibration", "tokenizer", "refine_seconds", "cache_target"})
    hints: ClassVar[Mapping[str, str]] = {"num_kv_heads": "a latent has no heads; rank and rope_dim say how wide it is"}

    rank: int | None = None
    rope_dim: int | None = None
    cache_target: float | int | None = None
    method: Literal["principal", "calibrated", "refined"] | None = None
    calibration: Any = field(default=None, compare=False, repr=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)
    seed: int = 0
    refine_steps: int = 150
    refine_seconds: float | None = None
    grade: Literal["exact"] = "exact"
    home: str = "auto"

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise AttnPatchError(f"method {self.method!r} does not exist; choose from: {', '.join(METHODS)}.")
        if self.grade != "exact":
            raise AttnPatchError(f"grade {self.grade!r} does not exist; choose from: exact.")
        check_name(self.home)
        for name, least in (("rank", 2), ("rope_dim", 2), ("seed", 0), ("refine_steps", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if (value is not None or least == 0) and not (whole and value >= least):
                raise AttnPatchError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise AttnPatchError(
                f"rope_dim is {self.rope_dim}; rotation takes pairs: choose {self.rope_dim - 1} or {self.rope_dim + 1}."
            )
        if self.rank is not None and (self.rope_dim is None or self.cache_target is not None):
            raise AttnPatchError("rank and rope_dim belong together, without cache_target; or give cache_target alone.")
        if self.rope_dim is not None and self.rank is None and self.cache_target is None:
            raise AttnPatchError("rope_dim needs rank, or a cache_target that says what is left for it.")
        _check_target(self.cache_target)
        seconds = self.refine_seconds
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise AttnPatchError(f"refine_seconds is {seconds!r}; it must be a positive number or None.")
        if isinstance(self.calibration, Iterable) and not isinstance(self.calibration, (Tensor, str, Mapping)):
            self._normalise("calibration", tuple(self.calibration))

    def to_record(self, finding: object = None) -> dict[str, Any]:
        """Return the JSON-able form, with the widths and the method that were used; see :meth:`Patch.to_record`."""
        used = {"method": finding.method, **finding.chosen} if isinstance(finding, DamageReport) else {}
        return {**super().to_record(finding), **used}

    def structure(self) -> Latent:
        """Return the same shapes from the cheapest method."""
        return changed(self, method=None if self._lossless else "principal", calibration=None)

    @property
    def _lossless(self) -> bool:
        return self.rank is None and self.cache_target is None

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Say what the model would become; see :meth:`Patch.propose`. Runs it on a few tokens."""
        source = read_source(model, anatomy)
        budget = self._budget(model, source)
        home = find_home(model, source, self.home)
        made = self._decided(source, budget)
        weights = Weights(source, home, budget)
        paths = tuple(s.path for s in source.sites)
        notes = [
            f"home: {home.row.model_type}; transformers from {home.row.since} on loads the checkpoint without this "
            "package"
        ]
        if budget is None:
            rank, rope = source.lossless
            notes.append(
                f"nothing is lost: rank {rank} and rotary width {rope} in the place of {source.cached} numbers a token "
                "and layer; a smaller cache takes a cache_target"
            )
            dtype = next(iter(model.parameters())).dtype
            if not keeps(dtype):
                notes.append(f"weights are rounded once more to {dtype}, which moves logits as its rounding does")
            after = f"{home.cls.__name__}: rank {rank}, rotary {rope}"
            return Proposal((weights.edit(after),), paths, tuple(notes), preserves=keeps(dtype), patch=made)
        said = f"{budget.total} of {source.cached} numbers a token and layer"
        if source.query_bias:
            notes.append("queries have a bias, which in a stock type takes a latent of their own, as wide as the model")
        after = f"{home.cls.__name__}: {said}"
        return Proposal(
            (weights.edit(after),),
            paths,
            (*notes, f"the cache holds {said}"),
            patch=made,
            prepare=_Prepare(made, weights, budget),
            release=weights.release,
        )

    def text(self, model: PreTrainedModel) -> list[Batch] | None:
        """Return the calibration text as batches of inputs, checked; None where none was given."""
        given = self.calibration
        return None if given is None else calibration_text.batches(given, self.tokenizer, model)

    def _decided(self, source: Source, budget: Budget | None) -> Latent:
        """Make the open choices.

        Raises:
            AttnPatchError: a method lacks its text.
        """
        if budget is None:
            rank, rope = source.lossless
            return changed(self, rank=rank, rope_dim=rope, cache_target=None, method=None, calibration=None)
        method = self.method or ("principal" if self.calibration is None else "refined")
        if method != "principal" and self.calibration is None:
            raise AttnPatchError(f"method {method!r} needs text; pass {_TEXT}.")
        return changed(self, method=method)

    def _budget(self, model: PreTrainedModel, source: Source) -> Budget | None:
        """Return how large the latent is to be, or None where everything fits.

        Raises:
            AttnPatchError: it cannot be so small, or has room for more than there is.
        """
        rank, rope = source.lossless
        if self._lossless or (self.rank, self.rope_dim) == (rank, rope):
            return None
        if self.rank is not None:
            if self.rank > rank or (self.rope_dim or 0) > rope:
                raise AttnPatchError(
                    f"rank {self.rank} and rope_dim {self.rope_dim} are more than there is: rank {rank} and rope_dim "
                    f"{rope} lose nothing."
                )
            return Budget(self.rank + (self.rope_dim or 0), self.rope_dim)
        total = self._total(model, source)
        if total >= rank + rope:
            return None
        least = LEAST if self.rope_dim is None else self.rope_dim + 2
        if total < least or (self.rope_dim or 0) > rope:
            width = min(self.rope_dim or 2, rope)
            raise AttnPatchError(
                f"cache_target {self.cache_target!r} leaves {total} numbers a token and layer, and rope_dim "
                f"{self.rope_dim} has to be between 2 and {rope}; the smallest cache_target that is possible with "
                f"rope_dim {width} is {(width + 2) / source.cached:.4g}."
            )
        return Budget(total, self.rope_dim)

    def _total(self, model: PreTrainedModel, source: Source) -> int:
        """Return the numbers a token and layer that ``cache_target`` allows."""
        target: float | int | None = self.cache_target
        if isinstance(target, float):
            return int(target * source.cached + 1e-9)
        assert target is not None
        size = next(iter(model.parameters())).element_size()
        return int(target // (size * len(source.sites)))


@dataclass(frozen=True)
class _Prepare:
    """Works out the weights, for the edit to write."""

    patch: Latent
    weights: Weights
    budget: Budget

    def __call__(self, model: PreTrainedModel) -> DamageReport:
        patch, source = self.patch, self.weights.source
        text = None if patch.method == "principal" else patch.text(model)
        if text is not None:
            calibration_text.check_amount(text, source.sites)
        how = How(patch.method or "", patch.seed, patch.refine_steps, patch.refine_seconds)
        done = convert(model, source, self.weights.home, self.budget, how, text)
        self.weights.conversion = done
        assert done.shape is not None
        layers = [done.layers[site.path] for site in source.sites]
        chosen = {"rank": done.shape.rank, "rope_dim": done.shape.rope_dim}
        return DamageReport(layers, how.method, tuple(done.notes), done.seconds, chosen)


def _check_target(target: object) -> None:
    number = isinstance(target, (int, float)) and not isinstance(target, bool) and target > 0
    if target is not None and not number:
        raise AttnPatchError(
            f"cache_target is {target!r}; it must be a share of the present cache (a float such as 0.25), or bytes per "
            "token (a whole number)."
        )
