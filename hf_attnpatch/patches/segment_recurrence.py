"""Segment-level recurrence for ordinary decoders: Transformer-XL's memory without its positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import FUSED, kernel_of, register, set_kernel
from ..attention.wrapper import AddWrapper
from ..backends import FLAG
from ..configs import config_at, declared
from ..edits import AddPreHook, Edit, SetAttention
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.segments import Segments
from ..patch import Patch, Proposal, changed
from ..positions.fusing import deferred, variants
from ..positions.keys import STATIC, Way
from ..recurrence.attention import Recurrent
from ..recurrence.modules import MemoryHook, recalling_of
from ..recurrence.native import MASKS_UNDER_EAGER, DeferWithMemory, window_of
from ..recurrence.survey import check_agrees, ways
from ..sites import Place, dispatching
from ..spans.attention import span_of
from ..upstream import words
from ..upstream.roles import roles_of
from ..weightless import is_restoring, runnable

KERNELS = ("eager", *FLAG)
_OVER_THE_PROBE = Segments(4, 32)  # for the probe, whose inputs are longer than a segment


@dataclass(frozen=True, kw_only=True)
class SegmentRecurrence(Patch):
    """Segment-level recurrence (Transformer-XL, 1901.02860, 3.2): attention to a memory of earlier keys and values.

    A token sees its own segment up to itself and ``memory_length`` tokens before the segment, in every layer.
    Information therefore travels up to depth times memory back, while cost per token and memory stay constant at any
    length. Longer calls are read segment by segment. Nothing is carried between calls, unless the caller decodes with
    the returned cache (as ``generate`` does) or opens a stream (:func:`hf_attnpatch.stream`). Gradients stop at the
    border of a segment. The model keeps its attention kernel, with this package's ALiBi or Transformer-XL terms if it
    has them. Families that compute attention themselves (BLOOM, MPT, Falcon, GPT-J, CodeGen) keep their forwards for
    calls of one segment; with a memory, torch's kernel attends inside them, with their own ALiBi. A layer with a
    sliding window sees no more of its memory than that window.

    Without memory and within one segment the model is unchanged, bit for bit. Stock transformers cannot express the
    patch, so checkpoints have this package's model type; the weights stay as they are.

    Args:
        segment_length: in tokens.
        memory_length: tokens before the segment that it attends to; 0 for none.
        positions: ``bounded``: positions restart in each segment, and cached keys are rotated back by the segments that
            have passed since, which is exact for rotary angles; a learned table is read from its first row in every
            segment, so that cached tokens keep the positions that they had. ``running``: positions continue, as far as
            the model can.
        num_sinks: number of first tokens of a text that every query sees, however far back (2309.17453, section 3):
            pretrained models put attention on them and lose quality once they leave the memory. With bounded positions
            their keys are rotated to stand just before the memory.

    Raises:
        UnsupportedArchitecture: a layer caches something other than keys and values, attends in chunks, or rotates its
            keys in an unknown way; the model has an encoder, or differs with a memory of the whole past.
        AttnPatchError: an argument is out of range, or a learned table has fewer rows than the segment has tokens.
    """

    name: ClassVar[str] = "segment_recurrence"
    wraps: ClassVar[bool] = True
    height: ClassVar[int] = 2

    segment_length: int
    memory_length: int
    positions: Literal["bounded", "running"] = "bounded"
    num_sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("segment_length", 1), ("memory_length", 0), ("num_sinks", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnPatchError(f"{name} is {value!r}; it must be a number of tokens, at least {least}.")
        if self.positions not in ("bounded", "running"):
            raise AttnPatchError(f"positions {self.positions!r} do not exist; choose from bounded, running.")

    def propose(self, model: PreTrainedModel, anatomy: Anatomy) -> Proposal:
        """Return the edits that add the memory and rotate its keys; see :meth:`Patch.propose`."""
        if model.config.is_encoder_decoder or any(site.cross or site.tower for site in anatomy.sites):
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: segment memory holds one text, and this model reads two."
            )
        other = next(iter({**anatomy.other, **anatomy.unread}.items()), None)
        if other is not None:
            raise UnsupportedArchitecture(
                f"{other[0]}: {other[1]}, which a memory of keys and values does not carry on."
            )
        if self.num_sinks and (anatomy.alibi or anatomy.relative):
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: attention sinks need a fixed distance; use num_sinks=0 with distance-biased "
                f"scores."
            )
        far = next((path for path in anatomy.attending if span_of(model.get_submodule(path)) is not None), None)
        if far is not None:
            raise UnsupportedArchitecture(
                f"{far}: its distances are remapped for texts longer than it was trained on; with a memory no distance "
                f"exceeds "
                "a segment and the memory, so that there is nothing left to remap."
            )
        both = next((site.path for site in anatomy.sites if site.causal is False), None)
        if both is not None:
            raise UnsupportedArchitecture(
                f"{both}: attention is bidirectional; segment recurrence needs a causal model."
            )
        places, native = _places(model, anatomy)
        decoder = _decoder(model, anatomy, places)
        self._check(model, anatomy, places, decoder)
        kernel = _native_kernel(model) if native else _kernel(model)
        turning = self._turning(model, anatomy, places)
        attention = tuple(_itself(model, anatomy, places, kernel)) if native else (set_kernel(kernel),)
        common = (*self._edits(model, places, turning), *attention)
        segments = Segments(self.segment_length, self.memory_length, self.num_sinks)
        edits = (*common, self._recalling(model, anatomy, places, decoder, segments))
        if not is_restoring():
            turns = bool(anatomy.rotary or anatomy.inner or anatomy.turned)
            probed = self if turns else changed(self, positions="running")
            probing = probed._recalling(model, anatomy, places, decoder, _OVER_THE_PROBE)
            check_agrees(model, anatomy, (*common, probing), padded=turns)
        return Proposal(
            edits,
            tuple(place.path for place in places),
            tuple(self._notes(kernel, turning)),
            stock=False,
            claims=(
                "the memory",
                "the positions",
            ),  # within one plan: keys are rotated back as the model rotates them now
        )

    def _edits(
        self,
        model: PreTrainedModel,
        places: list[Place],
        turning: Mapping[str, Way | None],
    ) -> Iterator[Edit]:
        for number, place in enumerate(places):
            way = turning.get(place.path)
            rotary = (None,) if way is None else (model.get_submodule(way[0]), *way[1:])
            yield AddWrapper(place.path, Recurrent(number, *rotary, window=_window(model, place)))

    def _recalling(
        self, model: PreTrainedModel, anatomy: Anatomy, places: list[Place], decoder: str, segments: Segments
    ) -> Edit:
        hook = MemoryHook(
            roles_of(model.get_submodule(decoder)),
            config_at(model, places[0].config),
            segments,
            self.positions == "bounded",
            len(places),
            anatomy.max_positions if anatomy.tables or anatomy.inner or anatomy.added == "table" else None,
            native=anatomy.native,
        )
        return AddPreHook(decoder, hook, "hands its attention modules their memory", first=True)

    def _check(self, model: PreTrainedModel, anatomy: Anatomy, places: list[Place], decoder: str) -> None:
        placed = anatomy.rotary or anatomy.inner or anatomy.tables or (anatomy.turned and not anatomy.native)
        wanted, roles = (
            (words.POSITIONS, words.CACHE) if placed else (words.CACHE,),
            roles_of(model.get_submodule(decoder)),
        )
        absent = next((role for role in wanted if not roles.takes(role)), None)
        if absent is not None:
            raise UnsupportedArchitecture(f"{decoder}: its forward takes no {absent}, by which it is told what is new.")
        types = set(declared(config_at(model, places[0].config), "layer_types") or ["full_attention"])
        if not types <= {"full_attention", "sliding_attention"}:
            raise UnsupportedArchitecture(
                f"{anatomy.architecture}: has layers that see a chunk only, or keep something else "
                f"({', '.join(sorted(types))}), which evicts keys by its own rule."
            )
        if (anatomy.tables or anatomy.inner) and (anatomy.max_positions or 0) < self.segment_length:
            raise AttnPatchError(
                f"segment_length {self.segment_length}: the model's table has {anatomy.max_positions} positions; "
                "choose at most as many."
            )
        for rotary in anatomy.rotary:
            kinds = rotary.rope_type.values() if isinstance(rotary.rope_type, Mapping) else [rotary.rope_type]
            moving = next((kind for kind in kinds if kind not in STATIC), None)
            if moving is not None and (
                self.positions == "running" or self.segment_length > (anatomy.max_positions or 0)
            ):
                raise UnsupportedArchitecture(
                    f"{rotary.path}: {moving!r} angles depend on the length of the text; positions='bounded' and "
                    f"segments of at most {anatomy.max_positions} tokens keep them still."
                )

    def _turning(self, model: PreTrainedModel, anatomy: Anatomy, places: list[Place]) -> dict[str, Way | None]:
        paths = [place.path for place in places]
        with runnable(model):
            found = ways(model, anatomy, paths) if self.positions == "bounded" else {}
        return {path: way for path, way in found.items() if way is not None}

    def _notes(self, kernel: str, turning: Mapping[str, Way | None]) -> Iterator[str]:
        yield (
            f"segments of {self.segment_length} tokens, each with {self.memory_length} before it, through {kernel}; a "
            f"token costs as much as with {self.segment_length + self.memory_length} at most"
        )
        if self.num_sinks:
            yield f"the first {self.num_sinks} tokens of a text stay in the memory for good"
        if turning:
            how = sorted({("neighbours" if way[2] else "halves") for way in turning.values() if way is not None})
            yield f"positions begin anew in each segment; keys in memory are turned back ({', '.join(how)})"
        yield "what a text was before a call is carried where a stream is open or a cache is passed, and nowhere else"


def _places(model: PreTrainedModel, anatomy: Anatomy) -> tuple[list[Place], bool]:
    """Return the attention modules, and whether they compute their own scores.

    Raises:
        UnsupportedArchitecture: only some of them do, or all and in a way that cannot be followed.
    """
    if not anatomy.native:
        return dispatching(model, anatomy.sites, {}, {}), False
    ways = variants(model, anatomy)
    if isinstance(ways, str):
        raise UnsupportedArchitecture(f"{ways}, and no memory can be handed to it.")
    for site in anatomy.sites:
        window = window_of(model.get_submodule(site.path))
        if window is not None:
            raise UnsupportedArchitecture(
                f"{site.path}: {site.kind} sees a window only (its buffer {window!r}), which evicts keys by its own "
                f"rule."
            )
    return [Place(s.path, s.num_heads, s.causal, s.config) for s in anatomy.sites], True


def _window(model: PreTrainedModel, place: Place) -> int | None:
    """Return how many tokens a layer attends to, the query included; None for all."""
    module, config = model.get_submodule(place.path), config_at(model, place.config)
    kinds, number = declared(config, "layer_types"), getattr(module, "layer_idx", None)
    if kinds and number is not None and kinds[number] == "full_attention":
        return None
    found = getattr(module, "sliding_window", declared(config, "sliding_window"))
    return int(found) if found else None


def _itself(model: PreTrainedModel, anatomy: Anatomy, places: list[Place], kernel: str) -> Iterator[Edit]:
    """Yield the hooks of modules that compute their own scores, and the edit that selects their masks."""
    if kernel != "eager":
        found = deferred(model, anatomy)
        assert not isinstance(found, str)  # otherwise there would be no modules
        yield from found
        return
    for place in places:
        hook = DeferWithMemory(roles_of(model.get_submodule(place.path)), config_at(model, place.config))
        yield AddPreHook(place.path, hook, "its cache hands it the memory")
    yield SetAttention("", MASKS_UNDER_EAGER, register, True)


def _check_free(model: PreTrainedModel) -> None:
    held = next((path for path, module in model.named_modules() if recalling_of(module) is not None), None)
    if held is not None:
        raise UnsupportedArchitecture(f"{held or type(model).__name__}: has a memory already; revert it first.")


def _native_kernel(model: PreTrainedModel) -> str:
    """Return ``eager`` if the forwards compute scores themselves at present, else torch's kernel, deferred."""
    _check_free(model)
    found = str(model.config._attn_implementation)
    return "eager" if kernel_of(found) == "eager" else FUSED


def _kernel(model: PreTrainedModel) -> str:
    _check_free(model)
    found = kernel_of(str(model.config._attn_implementation))
    if found not in KERNELS:
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: attention {found!r} is of another kernel; a memory goes on top of "
            f"{', '.join(KERNELS)}."
        )
    return found


def _decoder(model: PreTrainedModel, anatomy: Anatomy, places: list[Place]) -> str:
    """Return the module that makes the masks: the one that holds the list of layers, or its parent (BERT)."""
    if anatomy.base is not None and roles_of(model.get_submodule(anatomy.base)).takes(words.TOKENS, words.CACHE):
        return anatomy.base
    parts = places[0].path.split(".")
    cut = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if cut is None or cut == 0:
        raise UnsupportedArchitecture(f"{places[0].path}: is not in a list of layers.")
    return ".".join(parts[: cut - 1])
