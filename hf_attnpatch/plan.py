"""``plan``: the edits of several patches in order, without conflicts. Printing it is the dry run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .anatomy import Anatomy, describe
from .edits import BecomeModel, Edit, SetConfig, tried
from .errors import AttnPatchError, NoWeights, PatchConflict, UnsupportedArchitecture
from .exclusive import alone, lock_of
from .interruption import all_or_nothing
from .patch import Patch, Proposal
from .probe import way_back
from .showing import Shown
from .stacking import in_order, lift, own
from .upstream.partitioned import is_partitioned
from .writable import check_replaced, check_writable


@dataclass(frozen=True)
class Step:
    """One patch, its proposal, and a preview (old, new) of each of its edits.

    Attributes:
        again: whether it was on the model already, and is put back above one that went beneath it.
    """

    patch: Patch
    proposal: Proposal
    previews: tuple[tuple[str, str], ...]
    again: bool = False


@dataclass(frozen=True)
class Plan(Shown):
    """The edits of several patches, in order.

    Attributes:
        anatomy: the model as it is.
        steps: one for each patch.
    """

    anatomy: Anatomy
    steps: tuple[Step, ...]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All edits, in order."""
        return tuple(edit for step in self.steps for edit in step.proposal.edits)

    @property
    def stock(self) -> bool:
        """Whether stock transformers will load the checkpoint."""
        return all(step.proposal.stock for step in self.steps)

    @property
    def context(self) -> tuple[int, int] | None:
        """The declared context in tokens, before and after; None if it stays."""
        before = self.anatomy.max_positions
        edited = [e.value for e in self.edits if isinstance(e, SetConfig) and e.field == "max_position_embeddings"]
        reached = [getattr(step.patch, "target_length", None) for step in self.steps if step.proposal.edits]
        after = max((n for n in (*edited, *reached) if isinstance(n, int)), default=0)
        return (before, after) if before is not None and after > before else None

    def to_dict(self) -> dict[str, Any]:
        """Return what would be done, as JSON."""
        patches = [
            {
                **(step.proposal.patch or step.patch).to_record(),
                "stock": step.proposal.stock,
                "edits": [
                    {"where": edit.claim, "rung": edit.rung, "before": before, "after": after}
                    for edit, (before, after) in zip(step.proposal.edits, step.previews, strict=True)
                ],
                "notes": list(step.proposal.notes),
            }
            for step in self.steps
        ]
        context = None if self.context is None else list(self.context)
        return {"model": self.anatomy.architecture, "stock": self.stock, "context": context, "patches": patches}

    def _in_short(self) -> str:
        from .tables import title  # takes a while to import

        what = ", ".join(map(title, self.steps))
        kind = "stock" if self.stock else "hf_attnpatch"
        return f"{self.anatomy.architecture}, {len(self.edits)} edits, checkpoint for {kind}: {what}"

    def __str__(self) -> str:
        from .tables import render_plan

        return render_plan(self)


def plan(model: PreTrainedModel, *patches: Patch) -> Plan:
    """Return what ``apply`` would do. The model is only read: what has to be tried is tried on a copy of its modules.

    The copy shares the memory of the parameters, so that it costs little. Another thread may run the model meanwhile.

    Args:
        model: a transformers model, weights in memory, neither quantized nor parallelised.
        patches: in the order in which they are to be applied; position remapping goes above other positions, and
            segment memory above everything.

    Raises:
        UnsupportedArchitecture: the model has no place for a patch, is wrapped, quantized, sharded or offloaded, or its
            modules cannot be copied.
        PatchConflict: two patches write to one place.
        AttnPatchError: an argument does not fit the model.
    """
    _check_arguments(model, patches)
    with alone(lock_of(model)):
        anatomy = _readable(model)
        for patch in in_order(patches):
            lift(model, patch)  # a stream that is open is seen here only: copies have none
        copied = copied_around_parameters(model)
    return Plan(anatomy, tuple(_steps(copied, anatomy, patches)))


def plan_in_place(model: PreTrainedModel, *patches: Patch) -> Plan:
    """Return the plan of ``apply``, which may try edits on the model itself and take them back; see :func:`plan`."""
    _check_arguments(model, patches)
    with alone(lock_of(model)):
        anatomy = _readable(model)
        return all_or_nothing(lambda: Plan(anatomy, tuple(_steps(model, anatomy, patches))), way_back(model))


def copied_around_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model's modules and configs whose parameters share the memory of the original ones.

    Parameters are new objects without gradients and hooks; edits of the copy replace them and write into none.

    Raises:
        UnsupportedArchitecture: something that a module holds cannot be copied.
    """
    for attempt in range(_ATTEMPTS):
        shared: dict[int, Any] = {id(parameter): _alias(parameter) for parameter in list(model.parameters())}
        shared |= {id(weights): weights for weights in _offloaded(model)}
        try:
            return copy.deepcopy(model, shared)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            if "during iteration" not in str(error) or attempt == _ATTEMPTS - 1:  # another thread runs the model
                raise UnsupportedArchitecture(
                    f"{type(model).__name__}: its modules cannot be copied ({type(error).__name__}: {error}), and a "
                    "plan tries patches on a copy only; call apply, whose report can be reverted."
                ) from error
    raise AssertionError


_ATTEMPTS = 20  # a forward of another thread changes a dictionary of a module for an instant


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter on the same memory; a subclass with data of its own is shared as it is."""
    if type(parameter) is not nn.Parameter or is_partitioned(parameter):
        return parameter
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def _offloaded(model: PreTrainedModel) -> Iterator[object]:
    """Yield the mappings from which Accelerate's hooks load weights: a copy reads the same ones."""
    todo = [vars(module)["_hf_hook"] for module in model.modules() if "_hf_hook" in vars(module)]
    while todo:
        hook = todo.pop()
        todo += getattr(hook, "hooks", ())
        if getattr(hook, "weights_map", None) is not None:
            yield hook.weights_map


def _check_arguments(model: object, patches: Sequence[object]) -> None:
    if not patches:
        raise AttnPatchError(
            "no patch given; pass at least one, for example hf_attnpatch.GroupedQuery(num_kv_heads=2)."
        )
    if isinstance(model, Patch):
        raise AttnPatchError(f"the patch {model.name} stands where the model is wanted; pass the model first.")
    for number, patch in enumerate(patches, 1):
        if not isinstance(patch, Patch):
            raise AttnPatchError(f"argument {number} after the model is {_not_a_patch(patch)}.")


def _readable(model: PreTrainedModel) -> Anatomy:
    """Describe a model whose weights are plain tensors; what is sharded or quantized cannot even be read."""
    if isinstance(model, PreTrainedModel):
        check_writable(model)
    return describe(model)


def _steps(model: PreTrainedModel, anatomy: Anatomy, patches: Sequence[Patch]) -> list[Step]:
    patches = in_order(patches)
    proposed = [_step(model, anatomy, patch) for patch in patches]
    if len(patches) > 1 and any(_rewrites(step) for steps in proposed for step in steps):
        names = ", ".join(patch.name for patch in patches)
        raise PatchConflict(f"{names}: one of them gives modules other parameters; apply them in separate calls.")
    clashes = _clashes(patches, [first for first, *_ in proposed])  # those that are put on again claim what they had
    for claim, *both in clashes:
        (first, one), (second, other) = both
        if first.height == second.height and not (first.wraps and second.wraps and _one_moves(first, second)):
            advice = _advice(model, first, second)
            raise PatchConflict(
                f"{claim}: both {one.patch.name} and {other.patch.name} would write it; keep one{advice}."
            )
    if clashes or (len(patches) > 1 and any(again for _, *again in proposed)):
        return _in_turn(model, patches)
    return [step for steps in proposed for step in steps]


def _rewrites(step: Step) -> bool:
    """Whether a step leaves other modules than those that the next one was proposed on."""
    return any(isinstance(edit, BecomeModel) and edit.rewrites for edit in step.proposal.edits)


def _one_moves(first: Patch, second: Patch) -> bool:
    """Return whether two different patches do not both change positions."""
    return first.name != second.name and not (first.changes_positions and second.changes_positions)


def _step(model: PreTrainedModel, anatomy: Anatomy, patch: Patch) -> list[Step]:
    """Propose a patch, then put back those that build on what it changes, each on the model that the others make."""
    off = lift(model, patch)
    if not off.patches:
        return [_proposed(model, anatomy, patch)]
    with tried(model, off.edits):
        first, *above = _in_turn(model, (patch, *off.patches))
    if not first.proposal.edits:
        return [first]
    names = ", ".join(one.name for one in off.patches)
    note = f"{names}: taken off, and put on again above {patch.name}"
    proposal = dataclasses.replace(
        first.proposal, edits=(*off.edits, *first.proposal.edits), notes=(*first.proposal.notes, note)
    )
    previews = (*(edit.preview(model) for edit in off.edits), *first.previews)
    return [Step(first.patch, proposal, previews), *(dataclasses.replace(step, again=True) for step in above)]


def _proposed(model: PreTrainedModel, anatomy: Anatomy, patch: Patch) -> Step:
    proposal = patch.propose(model, anatomy)
    check_replaced(model, proposal.edits)
    own(patch.name, proposal.edits)
    return Step(proposal.patch or patch, proposal, tuple(edit.preview(model) for edit in proposal.edits))


def _in_turn(model: PreTrainedModel, patches: Sequence[Patch]) -> list[Step]:
    """Propose each patch on the model that those before it make, as separate calls would."""
    if not patches:
        return []
    steps = _step(model, describe(model), patches[0])
    if len(patches) == 1:
        return steps
    with tried(model, [edit for step in steps for edit in _structure(model, step)]):
        return [*steps, *_in_turn(model, patches[1:])]


def _structure(model: PreTrainedModel, step: Step) -> Sequence[Edit]:
    """Return edits that add the modules of a step; ``apply`` may have to compute their weights."""
    if step.proposal.prepare is None:
        return step.proposal.edits
    return step.patch.structure().propose(model, describe(model)).edits


def _not_a_patch(found: object) -> str:
    """Describe what was passed instead of a patch, and what to pass."""
    if isinstance(found, type):
        return f"the class {found.__name__}; pass patches, such as hf_attnpatch.GroupedQuery(num_kv_heads=2)"
    if isinstance(found, (list, tuple)):
        return f"a {type(found).__name__} of {len(found)}; pass patches one by one, as in apply(model, *patches)"
    if isinstance(found, Mapping):
        return "a mapping; pass patches, such as hf_attnpatch.from_spec(mapping) gives"
    text = repr(found) if isinstance(found, (str, int, float, type(None))) else f"a {type(found).__name__}"
    return f"{text[:60]}; pass patches, such as hf_attnpatch.GroupedQuery(num_kv_heads=2)"


def _clashes(
    patches: Sequence[Patch], steps: Sequence[Step]
) -> list[tuple[str, tuple[Patch, Step], tuple[Patch, Step]]]:
    """Return each claim that two steps share, and the two, each with the requested patch."""
    owner: dict[str, tuple[Patch, Step]] = {}
    found = []
    for patch, step in zip(patches, steps, strict=True):
        edits = (edit.claim for edit in step.proposal.edits)
        for claim in dict.fromkeys((*edits, *step.proposal.claims, f"the patch {step.patch.name}")):
            first = owner.setdefault(claim, (patch, step))
            if first[1] is not step:
                found.append((claim, first, (patch, step)))
    return found


def _advice(model: PreTrainedModel, *patches: Patch) -> str:
    """Return the advice to use two calls, if that works on a copy of the modules around the same parameters.

    Raises:
        NoWeights: it cannot be tried.
    """
    try:
        _in_turn(copied_around_parameters(model), patches)
    except NoWeights:
        raise
    except AttnPatchError:
        return ""
    return ", or apply them in two calls if the second is meant to build on the first"
