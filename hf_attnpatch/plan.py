"""What would happen: the edits of several patches in order, conflicts refused. Printing it is the dry run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .anatomy import Anatomy, describe
from .edits import BecomeModel, Edit, SetConfig, tried
from .errors import AttnPatchError, NoWeights, PatchConflict
from .exclusive import alone, lock_of
from .interruption import all_or_nothing
from .patch import Patch, Proposal
from .probe import way_back
from .showing import Shown
from .stacking import in_order, lift, own
from .writable import check_replaced, check_writable


@dataclass(frozen=True)
class Step:
    """One patch, what it proposes, and a preview (old, new) of each of its edits.

    Attributes:
        again: whether it was on the model, and is put on again above one that came beneath it.
    """

    patch: Patch
    proposal: Proposal
    previews: tuple[tuple[str, str], ...]
    again: bool = False


@dataclass(frozen=True)
class Plan(Shown):
    """Edits of patches, in order.

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
        """The context that the model declares, in tokens, and the longer one that it will; None where it stays."""
        before = self.anatomy.max_positions
        edited = [e.value for e in self.edits if isinstance(e, SetConfig) and e.field == "max_position_embeddings"]
        reached = [getattr(step.patch, "target_length", None) for step in self.steps if step.proposal.edits]
        after = max((n for n in (*edited, *reached) if isinstance(n, int)), default=0)
        return (before, after) if before is not None and after > before else None

    def to_dict(self) -> dict[str, Any]:
        """Return what would be done, as JSON has it."""
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
    """Work out what ``apply`` would do, touching nothing.

    Args:
        model: a transformers model, weights in memory, neither quantized nor parallelised.
        patches: in the order they are to be applied; remapped positions stand on others, and a memory on all.

    Raises:
        UnsupportedArchitecture: the model has no place for a patch, or is wrapped, quantized, sharded or offloaded.
        PatchConflict: two patches claim one place.
        AttnPatchError: an argument does not fit the model.
    """
    if not patches:
        raise AttnPatchError(
            "no patch given; pass at least one, for example hf_attnpatch.GroupedQuery(num_kv_heads=2)."
        )
    if isinstance(model, Patch):
        raise AttnPatchError(f"the patch {model.name} stands where the model is wanted; pass the model first.")
    for number, patch in enumerate(patches, 1):
        if not isinstance(patch, Patch):
            raise AttnPatchError(f"argument {number} after the model is {_not_a_patch(patch)}.")
    with alone(lock_of(model)):
        if isinstance(model, PreTrainedModel):
            check_writable(model)  # first: what is sharded or quantized cannot even be read
        anatomy = describe(model)
        # some patches try edits out
        return all_or_nothing(lambda: Plan(anatomy, tuple(_steps(model, anatomy, patches))), way_back(model))


def _steps(model: PreTrainedModel, anatomy: Anatomy, patches: Sequence[Patch]) -> list[Step]:
    patches = in_order(patches)
    proposed = [_step(model, anatomy, patch) for patch in patches]
    if len(patches) > 1 and any(_rewrites(step) for steps in proposed for step in steps):
        return _in_turn(model, patches)
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
    """Whether two different patches leave no doubt about positions."""
    return first.name != second.name and not (first.changes_positions and second.changes_positions)


def _step(model: PreTrainedModel, anatomy: Anatomy, patch: Patch) -> list[Step]:
    """Propose a patch, and again those that stand on what it changes, each on the model that those before it make."""
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
    """Return edits that put the modules of a step in place; their weights may have to be worked out by ``apply``."""
    if step.proposal.prepare is None:
        return step.proposal.edits
    return step.patch.structure().propose(model, describe(model)).edits


def _not_a_patch(found: object) -> str:
    """Say what was passed in the place of a patch, and what to pass."""
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
    """Return each claim that two steps make, and the two, each with the patch that was asked for."""
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
    """Say that two calls would do, if they do: on a copy of the modules around the same parameters.

    Raises:
        NoWeights: they cannot be tried.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    try:
        _in_turn(copy.deepcopy(model, shared), patches)  # edits replace parameters, and write into none
    except NoWeights:
        raise
    except AttnPatchError:
        return ""
    return ", or apply them in two calls if the second is meant to build on the first"
