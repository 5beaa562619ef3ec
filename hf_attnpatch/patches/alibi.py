"""Replaces a model's positions by ALiBi."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.alibi import AlibiBias, alibi_of
from ..attention.registry import guarded, kernel_of, set_kernel
from ..attention.wrapper import AddWrapper
from ..backends import Candidate
from ..edits import Edit
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..patch import Patch, Proposal
from ..positions.choice import BACKENDS, choose
from ..positions.counting import counted
from ..positions.fusing import rebiased
from ..positions.removal import BIAS, check_blind, check_followed, removal, removed
from ..positions.sinks import passes_sinks
from ..sites import Place, dispatching


@dataclass(frozen=True, kw_only=True)
class Alibi(Patch):
    """Attention with linear biases (ALiBi, 2108.12409, 3): a bias linear in distance replaces the model's positions.

    Rotary modules are fixed at position 0, and position tables are removed together with the length limit they set. A
    fused kernel applies the bias as a few extra dimensions of queries and keys (or as ``alibi_slopes``, or as flex
    attention's ``score_mod``), in linear memory. A model that was not trained with ALiBi has to be trained; its slopes
    may be warmed up (:func:`hf_attnpatch.set_alibi_strength`), which gave no better result in our studies. Stock
    transformers cannot express the result, so checkpoints have this package's model type. BLOOM, MPT and Falcon, which
    have ALiBi, can be given other slopes or clipped distances.

    Args:
        slopes: ``"paper"``, or one number for each query head.
        backend: ``auto`` (the fastest that runs here and matches the reference on a probe), ``sdpa``,
            ``flex_attention``, ``flash_attention_2``, ``_3``, ``_4``, or ``eager``, the dense reference.
        exact: compute positions and slopes exactly in every dtype; False rounds slope times position to the model's
            dtype, as BLOOM does.
        distance_clip: larger distances, in tokens, count as this one; None does not clip.
        strength: factor on the slopes.
        training: whether a backward pass is needed; None reads ``model.training``.

    Raises:
        UnsupportedArchitecture: positions are computed inside the attention modules, or no backend runs.
        AttnPatchError: the number of slopes differs from the number of heads, or an argument is out of range.
    """

    name: ClassVar[str] = "alibi"
    changes_positions: ClassVar[bool] = True
    wraps: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = frozenset({"training"})

    slopes: Literal["paper"] | Sequence[float] = "paper"
    backend: Literal[
        "auto", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager"
    ] = "auto"
    exact: bool = True
    distance_clip: int | None = None
    strength: float = 1.0
    training: bool | None = None
    # while a checkpoint is loaded, its structure is not probed again
    proved: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.slopes, Tensor):
            self._normalise("slopes", tuple(float(s) for s in self.slopes.detach().double().flatten()))
        elif not isinstance(self.slopes, str):
            self._normalise("slopes", _numbers(self.slopes))
        if isinstance(self.slopes, str) and self.slopes != "paper":
            raise AttnPatchError(f"slopes {self.slopes!r} do not exist; choose 'paper', or give one for each head.")
        if self.backend not in ("auto", *BACKENDS):
            raise AttnPatchError(f"backend {self.backend!r} does not exist; choose from auto, {', '.join(BACKENDS)}.")
        clip = self.distance_clip
        if clip is not None and (not isinstance(clip, int) or isinstance(clip, bool) or clip < 1):
            raise AttnPatchError(f"distance_clip is {clip!r}; it must be a number of tokens, at least 1, or None.")
        if not isinstance(self.strength, (int, float)) or not 0 <= self.strength < float("inf"):
            raise AttnPatchError(f"strength is {self.strength!r}; it must be a number, 0 or more.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that remove the positions and add the bias, and the kernel; see :meth:`Patch.propose`."""
        given = None if isinstance(self.slopes, str) else tuple(self.slopes)
        bias = AlibiBias(given, self.distance_clip, self.exact, float(self.strength))
        if anatomy.biased:
            raise UnsupportedArchitecture(
                f"{anatomy.biased[0]}: has this package's ALiBi already; revert it first, or use set_alibi_strength."
            )
        if anatomy.native:
            return self._of_a_native(model, anatomy, bias)
        places = dispatching(model, anatomy.sites, anatomy.other, anatomy.unread)
        self._check_heads(places)
        common = [*removal(model, anatomy, own=BIAS), *_biased(places, bias)]
        name, notes = self._kernel(model, anatomy, common)
        paths = tuple(p.path for p in places)
        guards = guarded(model, anatomy.base, [(p.path, p.config) for p in places])
        edits = (*common, *guards, *counted(model, paths, alibi_of), set_kernel(name))
        return Proposal(edits, paths, (*removed(anatomy), *notes), stock=False, claims=("the positions",))

    def _of_a_native(self, model: PreTrainedModel, anatomy: Anatomy, bias: AlibiBias) -> Proposal:
        """Handle BLOOM, MPT, Falcon, GPT-J and CodeGen: their own positions are left out and this bias is added."""
        if self.backend not in ("auto", "sdpa"):
            raise AttnPatchError(f"{anatomy.architecture}: its own forward stays, which takes backend='sdpa' only.")
        self._check_heads([Place(s.path, s.num_heads, s.causal, s.config) for s in anatomy.sites])
        edits = rebiased(model, anatomy, bias)
        if isinstance(edits, str):
            raise UnsupportedArchitecture(
                f"{anatomy.sites[0].path}: {anatomy.sites[0].kind} computes its scores by itself and dispatches to no "
                f"attention function, and cannot be followed: {edits}."
            )
        edits = (*removal(model, anatomy, own=BIAS), *edits)
        if not self.proved:
            check_followed(model, anatomy, edits)
            check_blind(model, anatomy, edits)
        notes = (*removed(anatomy), f"{self._what()}, through torch's kernel inside the forwards that stay")
        paths = tuple(s.path for s in anatomy.sites)
        edits = (*edits, *counted(model, paths, alibi_of))
        return Proposal(edits, paths, notes, stock=False, claims=("the positions",))

    def _check_heads(self, places: list[Place]) -> None:
        for place in places if not isinstance(self.slopes, str) else ():
            if place.num_heads is not None and place.num_heads != len(self.slopes):
                raise AttnPatchError(
                    f"{place.path}: {len(self.slopes)} slopes for {place.num_heads} query heads; give one for each."
                )

    def _kernel(self, model: PreTrainedModel, anatomy: Anatomy, common: list[Edit]) -> tuple[str, list[str]]:
        """Return the backend, and what to say about it."""
        if self.proved:
            asked = kernel_of(model.config._attn_implementation)
            return (self.backend if self.backend != "auto" else asked if asked in BACKENDS else "sdpa"), []
        training = model.training if self.training is None else self.training
        head_dim = max((s.head_dim for s in anatomy.sites), default=0)
        request = Candidate(model, model.dtype, head_dim, training, passes_sinks(model, anatomy.dispatching))
        name, said = choose(anatomy, request, self.backend, common, "ALiBi")
        return name, [f"{self._what()}; {said}"]

    def _what(self) -> str:
        slopes = "the paper's slopes" if isinstance(self.slopes, str) else "given slopes"
        clip = "" if self.distance_clip is None else f", distance at most {self.distance_clip}"
        return f"biases by {slopes} times {self.strength:g}{clip}, {'exact' if self.exact else 'rounded'} positions"


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        found = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise AttnPatchError(f"slopes are {values!r}; give 'paper', or one number for each query head.") from error
    if not found:
        raise AttnPatchError("slopes are empty; give 'paper', or one number for each query head.")
    return found


def _biased(places: list[Place], bias: AlibiBias) -> Iterator[Edit]:
    held = {  # one for each number of heads, so that a rank of tensor parallelism knows which of them it has
        heads: AlibiBias(bias.given, bias.clip, bias.exact, bias.strength, heads)
        for heads in dict.fromkeys(place.num_heads for place in places)
    }
    for place in places:
        yield AddWrapper(place.path, held[place.num_heads])
