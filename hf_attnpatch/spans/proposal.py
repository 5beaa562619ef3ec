"""Common parts of the patches that remap distances: lengths, the edits, and the choice of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..attention.registry import guarded, kernel_of, set_kernel
from ..attention.wrapper import AddWrapper
from ..backends import Candidate, obstacle
from ..configs import config_path
from ..edits import AddPreHook, Edit
from ..errors import AttnPatchError, UnsupportedArchitecture
from ..functional.spans import Remapping, Sinks
from ..patch import Patch, Proposal
from ..positions.counting import counted
from ..positions.sinks import passes_sinks
from ..probe import default_inputs, logits_under, trial
from ..sites import Site
from ..upstream.roles import roles_of
from ..weightless import is_restoring, runnable
from .attention import RemapPositions, span_of
from .modules import EvictHook, Evicts
from .survey import Found, by_itself, survey

BACKENDS = ("auto", "sdpa", "eager")


class Spanning(Protocol):
    """Fields that every remapping patch has."""

    @property
    def name(self) -> str: ...  # noqa: D102 - see Patch
    @property
    def trained_length(self) -> int | None: ...  # noqa: D102 - tokens that the model handles by itself
    @property
    def backend(self) -> str: ...  # noqa: D102 - auto, sdpa or eager


class Reaching(Protocol):
    """Fields of remapping patches with a length to reach."""

    @property
    def name(self) -> str: ...  # noqa: D102 - see Patch
    @property
    def target_length(self) -> int | None: ...  # noqa: D102 - in tokens
    @property
    def factor(self) -> float | None: ...  # noqa: D102 - the same as a multiple of the trained length


def check_fields(patch: Reaching | Spanning, backend: str, **lengths: int | None) -> None:
    """Refuse invalid lengths and unknown backends.

    Raises:
        AttnPatchError: names the field, what was found and what is allowed.
    """
    if backend not in BACKENDS:
        raise AttnPatchError(f"backend {backend!r} does not exist; choose from {', '.join(BACKENDS)}.")
    for name, value in lengths.items():
        least = 0 if name in ("num_sinks", "start") else 1 if name == "group" else 2
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise AttnPatchError(f"{patch.name}: {name} is {value!r}; it must be a whole number, at least {least}.")


def trained_length(patch: Spanning, anatomy: Anatomy) -> int:
    """Return the trained length: tokens that the model handles without the patch.

    Raises:
        UnsupportedArchitecture: neither the patch nor the config declares one.
    """
    length = patch.trained_length or anatomy.max_positions
    if not isinstance(length, int) or length < 8:
        raise UnsupportedArchitecture(
            f"{anatomy.architecture}: its config declares a context of {length!r} tokens; pass trained_length=, the "
            "length it was trained at."
        )
    return length


def target_length(patch: Reaching, trained: int) -> int | None:
    """Return the length to reach, in tokens; None if none was given.

    Raises:
        AttnPatchError: it is not above the trained length.
    """
    target = patch.target_length if patch.factor is None else round(patch.factor * trained)
    if target is not None and target <= trained:
        raise AttnPatchError(
            f"{patch.name}: target_length {target} is not above the {trained} tokens that the model handles by itself; "
            "there is nothing to extend."
        )
    return target


def within(patch: Patch, trained: int, **lengths: int) -> None:
    """Refuse distances that the model has not been trained on.

    Raises:
        AttnPatchError: one of the lengths is above the trained length.
    """
    for name, value in lengths.items():
        if value > trained:
            raise AttnPatchError(
                f"{patch.name}: {name} {value} is above the {trained} tokens that the model was trained on, so "
                f"distances within "
                "it are as unknown to the model as those beyond; choose a smaller value."
            )


def spanned(
    patch: Spanning, model: PreTrainedModel, anatomy: Anatomy, span: Remapping, small: Remapping, notes: Sequence[str]
) -> Proposal:
    """Return the proposal of a patch with all fields chosen.

    Args:
        patch: with every length set.
        model: as in :meth:`Patch.propose`.
        anatomy: likewise.
        span: the remapping.
        small: the same kind, but short enough that a few tokens reach beyond it; kernels are compared on it.
        notes: for the report.

    Raises:
        UnsupportedArchitecture: no module can be remapped, or no kernel runs here.
    """
    held = next((path for path, module in model.named_modules() if span_of(module) is not None), None)
    if held is not None:
        raise UnsupportedArchitecture(f"{held}: a patch of this package remaps its distances already; revert it first.")
    with runnable(model):
        found, left = survey(model, anatomy)
    edits = [
        *_edits(model, anatomy, found, span),
        *_caches(model, found, span),
        *counted(model, tuple(found), span_of, turned=True),
    ]
    kernel, said = _kernel(patch, model, anatomy, lambda dense: _edits(model, anatomy, found, small, dense))
    return Proposal(
        (*edits, *kernel),
        tuple(found),
        (*notes, *left, *said),
        stock=False,
        claims=("the positions",),
        promise=Evicts(len(found)) if isinstance(span, Sinks) else None,
        patch=cast(Patch, patch),
    )


def _edits(
    model: PreTrainedModel, anatomy: Anatomy, found: Found, span: Remapping, dense: bool = False
) -> Iterator[Edit]:
    sites: dict[str, Site] = {site.path: site for site in anatomy.sites}
    for path, (rotary, buffer, interleaved, first) in found.items():
        held = RemapPositions(span, model.get_submodule(rotary), buffer, interleaved, first, dense=dense)
        yield AddWrapper(path, held)
    if anatomy.native:
        return  # deferred attention works under any implementation
    places = [
        (path, sites[path].config if path in sites else config_path(model, model.get_submodule(path).config) or "")
        for path in found
    ]
    yield from guarded(model, anatomy.base, places)


def _caches(model: PreTrainedModel, found: Found, span: Remapping) -> Iterator[Edit]:
    if not isinstance(span, Sinks):
        return
    for path in found:
        hook = EvictHook(roles_of(model.get_submodule(path)), span)
        yield AddPreHook(path, hook, "an empty cache becomes one that evicts tokens", first=True)


def _kernel(
    patch: Spanning, model: PreTrainedModel, anatomy: Anatomy, trying: Callable[[bool], Iterator[Edit]]
) -> tuple[Sequence[Edit], list[str]]:
    """Return the edits that select a kernel, and notes; flash calls are compared with dense attention on a probe."""
    if anatomy.native and patch.backend == "eager":
        raise UnsupportedArchitecture(
            f"{anatomy.sites[0].path}: {anatomy.sites[0].kind} computes its scores by itself, and only a fused "
            "kernel can take its place; leave backend='auto'."
        )
    through = by_itself(model, anatomy)
    if is_restoring():  # the comparison needs weights
        asked = kernel_of(model.config._attn_implementation)
        kernel = patch.backend if patch.backend != "auto" else asked if asked in BACKENDS[1:] else "sdpa"
        return through if anatomy.native else (set_kernel(kernel),), []
    inputs = default_inputs(model)
    reference = logits_under(model, [*trying(True), *through], inputs)
    if patch.backend == "eager":
        return through, ["dense, with every score in memory"]
    fused = through if anatomy.native else (set_kernel("sdpa"),)
    head_dim = max((site.head_dim for site in anatomy.sites), default=0)
    request = Candidate(model, model.dtype, head_dim, False, passes_sinks(model, anatomy.dispatching))
    why = None if anatomy.native else obstacle("sdpa", request)
    why = why or trial(model, [*trying(False), *fused], inputs, reference, backward=False)
    if why is not None:
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: flash calls cannot be merged here: {why}. backend='eager' computes it densely."
        )
    return fused, ["flash calls merged by log-sum-exp, equal to the dense way on a few tokens"]
