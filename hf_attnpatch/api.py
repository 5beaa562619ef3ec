"""``apply``: plan, edit, self-check, report and record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from . import foreign, record
from .beside import Before, beside_text, remember
from .edits import (
    BecomeModel,
    FirstLayers,
    SetAttribute,
    SetConfig,
    SetConfigClass,
    Write,
    tried,
    undo_all,
    write_all,
)
from .errors import AttnPatchError, SelfCheckFailed, UnsupportedArchitecture
from .exclusive import alone, lock_of
from .few import calls_of_all, left, one_of_each
from .functional.finite import all_finite
from .interruption import all_or_nothing, ensured
from .media import Probes, probes
from .patch import Patch
from .plan import Plan, plan_in_place
from .probe import (
    Inputs,
    Trace,
    check_in_memory,
    checked_inputs,
    disagreement,
    largest_difference,
    trace,
    way_back,
)
from .report import Report
from .selfcheck import decoding
from .tested import warn_if_newer
from .upstream import words
from .upstream.roles import roles_of


@torch.inference_mode(False)  # inference tensors could never be trained
def apply(model: PreTrainedModel, *patches: Patch, probe: Inputs | None = None, self_check: bool = True) -> Report:
    """Patch a model in place, check it on a few tokens, and report what was done.

    Everything happens or nothing: any exception, Ctrl-C included, undoes every write, and the model is bitwise what it
    was. Two threads may patch one model, one after the other; none may run it meanwhile. New weights are made layer by
    layer; the replaced ones stay in memory, for ``revert``, until the report is dropped.

    Args:
        model: a transformers model with its weights in memory.
        patches: in the order in which they are applied.
        probe: inputs for the self-check; by default two rows of eight tokens, one left-padded, and images, sound or
            other inputs that the model takes, as far as they can be built.
        self_check: run the model on the probe before and after. Turn it off only if the model cannot run here.

    Raises:
        AttnPatchError: see :func:`plan`; ``SelfCheckFailed`` if the patched model breaks a promise of the patch.
    """
    return _apply(model, patches, probe, self_check, [])


def _apply(
    model: PreTrainedModel, patches: Sequence[Patch], probe: Inputs | None, self_check: bool, made: list[Report]
) -> Report:
    """Do what :func:`apply` does; the report is in ``made`` once the model is patched, before this returns."""
    warn_if_newer()
    given = None if probe is None else checked_inputs("probe", probe)
    lock = lock_of(model)
    with alone(lock):
        steps = plan_in_place(model, *patches)
        if not steps.edits:
            return Report(steps, {"edits": "none needed; the model is untouched"}, None)
        check_in_memory(model)
        writes, as_it_was = list[Write](), way_back(model)

        def put_back() -> None:
            made.clear()
            undo_all(writes)
            as_it_was()

        def call() -> Report:
            checks, findings = _applied(model, steps, given, self_check, writes)
            report = Report(steps, checks, getattr(model.config, record.FIELD, None), findings, writes, lock)
            made.append(report)
            return report

        return all_or_nothing(call, put_back)


def _applied(
    model: PreTrainedModel, steps: Plan, given: Inputs | None, self_check: bool, writes: list[Write]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the edits, check the model, and return the results of the checks and of the patches."""
    sites = tuple(dict.fromkeys(path for step in steps.steps for path in step.proposal.sites))
    asked = (probes(model) if given is None else Probes(given)) if self_check else None
    inputs = None if asked is None else asked.main
    cut = None if inputs is None or given is not None or _preserves(steps) else _cut(model, steps, inputs)
    before = None if inputs is None else _before(model, inputs, sites, cut)
    more = Before() if asked is None or before is None else remember(model, asked, before, sites)
    if before is not None:
        _check_finite(model, before)
    findings = {s.patch.name: s.proposal.prepare(model) for s in steps.steps if s.proposal.prepare is not None}
    write_all(model, (*steps.edits, *_bookkeeping(model, steps, findings)), writes)
    for release in (s.proposal.release for s in steps.steps if s.proposal.release is not None):
        release()
    if inputs is None or before is None:
        return {"self-check": "not run"}, findings
    after = None if cut is None else _as_expected(model, steps, inputs, before, cut)
    if cut is not None and after is None:  # only the whole model shows what is wrong
        undo_all(writes)
        before = trace(model, inputs, sites)
        _check_finite(model, before)
        for write in writes:
            write.do()
    checks = _check(model, steps, inputs, before, {*sites} != {*more.silent} or not sites, after)
    if cut is not None and after is not None:
        checks["largest change of a logit"] += f", in the first {cut.count} of its layers"
    checks |= beside_text(model, more, _preserves(steps))
    return checks | _check_decoding(model, steps, inputs, writes), findings


def _check_finite(model: PreTrainedModel, before: Trace) -> None:
    if not all_finite(before.logits):
        raise AttnPatchError(
            f"{type(model).__name__}: its logits on the probe are not finite before anything is patched; look at its "
            "weights and dtype, or pass probe={...} with inputs that it was made for."
        )


def _preserves(steps: Plan) -> bool:
    """Return whether no patch may change the logits."""
    return all(s.proposal.preserves or not s.proposal.edits for s in steps.steps)


def _cut(model: PreTrainedModel, steps: Plan, inputs: Inputs) -> FirstLayers | None:
    """Return the edit that keeps enough layers for a comparison, if inputs are tokens of one sequence; else None."""
    names = roles_of(model).names
    plain = set(inputs) <= {names.get(words.TOKENS), names.get(words.MASK)}
    return one_of_each(model, steps.anatomy.attending) if plain else None


def _before(model: PreTrainedModel, inputs: Inputs, sites: tuple[str, ...], cut: FirstLayers | None) -> Trace:
    """Run the unpatched model, or its first layers, from which the calls of all modules follow."""
    if cut is None:
        return trace(model, inputs, sites)
    try:
        with tried(model, [cut]):
            found = trace(model, inputs, left(cut, sites))
    except AttnPatchError:
        return trace(model, inputs, sites)
    return Trace(found.logits, calls_of_all(model, cut, found.calls, sites))


def _as_expected(model: PreTrainedModel, steps: Plan, inputs: Inputs, before: Trace, cut: FirstLayers) -> Trace | None:
    """Run the patched model's first layers, and all of it on two tokens; None if anything is unexpected.

    Decoding is then checked on the same layers, so that the whole model runs only once.
    """
    sites, rows = tuple(before.calls), {name: tensor[: len(tensor) // 2, :2] for name, tensor in inputs.items()}
    if not sites or one_of_each(model, steps.anatomy.attending) != cut:
        return None  # no module ran, or layers of one kind differ after the patch
    try:
        with tried(model, [cut]):
            after = trace(model, inputs, left(cut, sites))
        whole = trace(model, rows, sites)
    except AttnPatchError:
        return None
    alike = after.logits.shape == before.logits.shape and whole.calls == before.calls
    fine = alike and all(all_finite(found.logits) for found in (after, whole))
    return Trace(after.logits, whole.calls) if fine else None


@contextlib.contextmanager
def patched(model: PreTrainedModel, *patches: Patch, probe: Inputs | None = None) -> Iterator[Report]:
    """Patch for the duration of a ``with`` block; afterwards the model is bitwise what it was."""
    reports: list[Report] = []

    def put_back() -> None:
        for report in reports:
            report.revert()

    with ensured(put_back):
        yield _apply(model, patches, probe, True, reports)


def _bookkeeping(
    model: PreTrainedModel, steps: Plan, findings: Mapping[str, object]
) -> Iterator[SetAttribute | SetConfig | SetConfigClass]:
    """Yield the edits of the record, and of the model type where stock transformers would load it wrongly."""
    recorded = [s for s in steps.steps if s.patch.recorded and s.proposal.edits]
    if not recorded:
        return
    config, before = model.config, record.read(model.config)
    stock = all(s.proposal.stock for s in recorded) and (before is None or before.stock)
    again = {s.patch.name for s in recorded if s.again}
    kept = tuple(entry for entry in (before.patches if before else ()) if entry["patch"] not in again)
    entries = [{**s.patch.to_record(findings.get(s.patch.name)), "stock": s.proposal.stock} for s in recorded]
    moved = [edit.model_type for edit in steps.edits if isinstance(edit, BecomeModel)]
    after = record.Record(
        patches=(*kept, *entries),
        base_model=before.base_model if before else record.source_of(model),
        base_model_type=moved[-1] if moved else before.base_model_type if before else config.model_type,
        stock=stock,
        versions={"hf_attnpatch": _version(), "transformers": transformers.__version__},
        commands=before.commands if before else (),
        contexts=_contexts(before.contexts if before else (), steps.context),
    )
    yield SetConfig("", record.FIELD, after.to_dict())
    source = record.loaded_from(model)
    if source:  # the name now refers to another model
        yield SetAttribute("", record.LOADED_FROM, source)
        yield SetConfig("", "_name_or_path", record.IN_MEMORY)
        yield SetAttribute("", "name_or_path", record.IN_MEMORY)
    kind: Any = type(config)
    if not stock and foreign.config_class(kind) is not kind:
        yield SetConfigClass("", foreign.config_class(kind))


def _contexts(before: tuple[int, ...], change: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the lengths for which a tokenizer may have been made, and the last."""
    return before if change is None else (*before, *change) if change[0] not in before else (*before, change[1])


def _version() -> str:
    from . import __version__

    return __version__


def _check(
    model: PreTrainedModel, steps: Plan, inputs: Inputs, before: Trace, reached: bool, after: Trace | None
) -> dict[str, str]:
    """Run the patched model and check what the patches promise.

    Args:
        model: the patched model.
        steps: the plan that was carried out.
        inputs: of the forward.
        before: the trace of the unpatched model.
        reached: whether a probe calls a patched module.
        after: the trace of the patched model; None runs it.

    Raises:
        SelfCheckFailed: non-finite logits, another shape, a patched module that never ran, or logits that must not
            change.
        UnsupportedArchitecture: the patched attention receives arguments that it cannot compute with.
    """
    try:
        after = trace(model, inputs, tuple(before.calls)) if after is None else after
    except AttnPatchError as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnsupportedArchitecture):
            raise UnsupportedArchitecture(f"{cause} The model is unchanged.") from error
        raise SelfCheckFailed(
            f"{type(model).__name__} ran on the probe before the patch and does not after it "
            f"({type(cause).__name__}: {' '.join(str(cause).split())[:200]}): this family needs something "
            "that the patch does not know. The model is unchanged; please report it."
        ) from error
    if before.logits.shape != after.logits.shape or not all_finite(after.logits):
        problem = disagreement(before.logits, after.logits)
        raise SelfCheckFailed(f"after patching, the logits are wrong on the probe: {problem}. The model is unchanged.")
    silent = next((s.patch.name for s in steps.steps if s.proposal.edits and not s.proposal.sites), None)
    if silent is not None:
        raise SelfCheckFailed(f"{silent} names no module whose calls could be counted: nothing would prove its effect.")
    for path, count in before.calls.items():
        if after.calls.get(path, 0) != count or not count:
            raise SelfCheckFailed(
                f"{path}: ran {after.calls.get(path, 0)} times on the probe, {count} before; the patch has no effect."
            )
    difference = largest_difference(before.logits, after.logits)
    if not reached and difference == 0:
        raise SelfCheckFailed("no probe calls a module that was patched, and no logit moved: nothing proves an effect.")
    if _preserves(steps):
        problem = disagreement(before.logits, after.logits)
        if problem:
            raise SelfCheckFailed(f"this patch must not change the logits, but {problem}. The model is unchanged.")
    return {
        "logits": f"finite, {tuple(after.logits.shape)}",
        "sites called": f"{len(before.calls)} of {len(before.calls)}, as often as before",
        "largest change of a logit": f"{difference:.3g} of the largest logit",
    }


def _check_decoding(model: PreTrainedModel, steps: Plan, inputs: Inputs, writes: list[Write]) -> dict[str, str]:
    """Compare cached decoding with the full forward; a fault that existed before the patch is reported, not refused.

    Raises:
        SelfCheckFailed: the patched model decodes other logits than its full forward, and did not before.
    """
    promises = [s.proposal.promise for s in steps.steps if s.proposal.promise is not None]
    sites = steps.anatomy.attending
    problem, said = decoding(model, inputs, sites, promises)
    if problem is None:
        return {"cached decoding": said}
    undo_all(writes)
    before, _ = decoding(model, inputs, sites)
    if before is None:
        raise SelfCheckFailed(
            f"the patched {type(model).__name__} does not decode what it computes at once: {problem}. Before the patch "
            "it did. The model is unchanged; please report it."
        )
    single, _ = decoding(model, inputs, sites, steps=(1, 1))
    for write in writes:
        write.do()
    if single is None:
        problem, said = decoding(model, inputs, sites, promises, steps=(1, 1))
        if problem is not None:
            raise SelfCheckFailed(f"the patched {type(model).__name__} does not decode token by token: {problem}.")
        return {"cached decoding": f"{said}; two tokens at once fail as before the patch: {before}"}
    return {"cached decoding": f"differs from the full forward, as before the patch: {before}"}
