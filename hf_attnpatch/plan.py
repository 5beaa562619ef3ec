"""What would happen: the edits of several patches in order, conflicts refused. Printing it is the dry run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from .anatomy import Anatomy, describe
from .edits import Edit, SetConfig, tried
from .errors import AttnPatchError, NoWeights, PatchConflict
from .exclusive import alone, lock_of
from .interruption import all_or_nothing
from .patch import Patch, Proposal
from .probe import way_back
from .recurrence.modules import recalling_of
from .showing import Shown
from .spans.attention import span_of
from .writable import check_replaced, check_writable


@dataclass(frozen=True)
class Step:
    """One patch, what it proposes, and a preview (old, new) of each of its edits."""

    patch: Patch
    proposal: Proposal
    previews: tuple[tuple[str, str], ...]


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
        from .report import title

        what = ", ".join(map(title, self.steps))
        kind = "stock" if self.stock else "hf_attnpatch"
        return f"{self.anatomy.architecture}, {len(self.edits)} edits, checkpoint for {kind}: {what}"

    def __str__(self) -> str:
        from .report import render_plan

        return render_plan(self)


def plan(model: PreTrainedModel, *patches: Patch) -> Plan:
    """Work out what ``apply`` would do, touching nothing.

    Args:
        model: a transformers model, weights in memory, neither quantized nor parallelised.
        patches: in the order they are to be applied.

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
    steps = [_step(model, anatomy, patch) for patch in patches]
    clash = _clash(patches, steps)
    if clash is None:
        return steps
    claim, *both = clash
    stacked = all(patch.wraps for patch in patches) and len({patch.name for patch in patches}) == len(patches)
    if stacked and sum(patch.changes_positions for patch in patches) < 2:
        return _in_turn(model, patches)
    first, second = (step.patch.name for _, step in both)
    advice = _advice(model, *((patch, step.proposal) for patch, step in both))
    raise PatchConflict(f"{claim}: both {first} and {second} would write it; keep one{advice}.")


def _step(model: PreTrainedModel, anatomy: Anatomy, patch: Patch) -> Step:
    _refuse_beneath_a_memory(model, patch)
    _refuse_stacked(model, patch)
    proposal = patch.propose(model, anatomy)
    check_replaced(model, proposal.edits)
    return Step(proposal.patch or patch, proposal, tuple(edit.preview(model) for edit in proposal.edits))


def _in_turn(model: PreTrainedModel, patches: Sequence[Patch]) -> list[Step]:
    """Propose each patch on the model that those before it make, as separate calls would."""
    if not patches:
        return []
    step = _step(model, describe(model), patches[0])
    with tried(model, step.proposal.edits):
        return [step, *_in_turn(model, patches[1:])]


def _refuse_beneath_a_memory(model: PreTrainedModel, patch: Patch) -> None:
    """Refuse what would change the positions or the attention that a memory was put on top of."""
    held = next((path for path, module in model.named_modules() if recalling_of(module) is not None), None)
    if held is not None and patch.name not in ("grouped_query", "segment_recurrence"):
        raise PatchConflict(
            f"{held or type(model).__name__}: has a memory (segment_recurrence), made for the positions and the "
            f"attention below it. Revert it, apply {patch.name}, and then put the memory on top again."
        )


def _refuse_stacked(model: PreTrainedModel, patch: Patch) -> None:
    """Refuse to change positions beneath attention that was patched to see them at other distances."""
    held = next((path for path, module in model.named_modules() if span_of(module) is not None), None)
    if held is not None and patch.changes_positions:
        raise PatchConflict(
            f"{held}: sees distances by an earlier patch, on whose positions it was built; {patch.name} would change "
            f"those beneath it. Revert that one, apply {patch.name}, and then extend the context again."
        )


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


def _clash(
    patches: Sequence[Patch], steps: Sequence[Step]
) -> tuple[str, tuple[Patch, Step], tuple[Patch, Step]] | None:
    """Return a claim that two steps make, and the two, each with the patch that was asked for; None without."""
    owner: dict[str, tuple[Patch, Step]] = {}
    for patch, step in zip(patches, steps, strict=True):
        edits = (edit.claim for edit in step.proposal.edits)
        for claim in (*edits, *step.proposal.claims, f"the patch {step.patch.name}"):
            first = owner.setdefault(claim, (patch, step))
            if first[1] is not step:
                return claim, first, (patch, step)
    return None


def _advice(model: PreTrainedModel, *calls: tuple[Patch, Proposal]) -> str:
    """Say that two calls would do, if they do: on a copy of the modules around the same parameters.

    Raises:
        NoWeights: they cannot be tried.
    """
    from .api import apply

    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    trial = copy.deepcopy(model, shared)
    try:
        for patch, proposal in calls:  # edits replace parameters, and write into none
            apply(trial, patch if proposal.prepare is None else patch.structure())
    except NoWeights:
        raise
    except AttnPatchError:
        return ""
    return ", or apply them in two calls if the second is meant to build on the first"
