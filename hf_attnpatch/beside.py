"""Self-checks beside text: images, sound, token types, positions with several axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .errors import AttnPatchError, SelfCheckFailed, UnsupportedArchitecture
from .functional.finite import all_finite
from .media import AXES, Probes
from .probe import Inputs, Trace, disagreement, largest_difference, trace
from .selfcheck import decoded_with


@dataclass(frozen=True)
class Before:
    """Results of the unpatched model.

    Attributes:
        inputs: name of what they contain -> inputs beside the main ones.
        traces: name -> the trace.
        decoding: name -> what was wrong with decoding, None if nothing was.
        missing: name of what could not be tried -> the reason.
        silent: paths of modules to be patched that no input reached.
    """

    inputs: Mapping[str, Inputs] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
    decoding: Mapping[str, str | None] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()


def remember(model: PreTrainedModel, asked: Probes, main: Trace, sites: tuple[str, ...]) -> Before:
    """Run the inputs beside the main probe, before anything is patched.

    Args:
        model: the unpatched model.
        asked: the probes.
        main: the trace of the main one.
        sites: paths of the modules that will be patched.
    """
    traces = {what: trace(model, inputs, sites) for what, inputs in asked.more.items()}
    silent = tuple(s for s in sites if not any(s in t.calls for t in (main, *traces.values())))
    decoding = {what: decoded_with(model, inputs) for what, inputs in asked.more.items()}
    return Before(asked.more, traces, decoding, asked.missing, silent)


def beside_text(model: PreTrainedModel, before: Before, preserves: bool) -> dict[str, str]:
    """Run the same inputs on the patched model, and return the results as text.

    Args:
        model: the patched model.
        before: results of the unpatched model.
        preserves: whether the patch must not change the logits.

    Raises:
        SelfCheckFailed: the patched model fails, or is wrong, on inputs that worked before.
    """
    found = {}
    for what, inputs in before.inputs.items():
        after, wanted = _after(model, what, inputs, before.traces[what]), before.traces[what]
        problem = disagreement(wanted.logits, after.logits)
        wrong = problem is not None and (preserves or not all_finite(after.logits) or "shape" in problem)
        if wrong or any(after.calls.get(path, 0) != count for path, count in wanted.calls.items()):
            raise SelfCheckFailed(
                f"{type(model).__name__}, with {what}: {problem if wrong else 'the patch has no effect'}. The model is "
                "unchanged."
            )
        decodes = decoded_with(model, inputs)
        if decodes is not None and before.decoding[what] is None:
            raise SelfCheckFailed(
                f"the patched {type(model).__name__}, with {what}, does not decode what it computes at once: {decodes}."
            )
        moved = largest_difference(wanted.logits, after.logits)
        as_before = "" if decodes is None else "; cached decoding differs from the full forward, as before the patch"
        found[f"with {what}"] = f"finite, {tuple(after.logits.shape)}, moved by {moved:.3g} of the largest{as_before}"
    if before.silent:
        found["sites not called"] = f"{len(before.silent)} ({before.silent[0]} ...): nothing is known of them"
    for what, why in before.missing.items():
        found[f"with {what}"] = f"not tried, so that nothing is known of it: {why}"
    return found


def _after(model: PreTrainedModel, what: str, inputs: Inputs, before: Trace) -> Trace:
    try:
        return trace(model, inputs, tuple(before.calls))
    except AttnPatchError as error:
        cause = error.__cause__ or error
        hint = "several axes of positions (images)" if what == AXES else what
        refused = isinstance(cause, AttnPatchError)  # a refusal with a reason, not a failure
        raise (UnsupportedArchitecture if refused else SelfCheckFailed)(
            f"{type(model).__name__} runs with {hint} before the patch, and does not after it "
            f"({type(cause).__name__}: {' '.join(str(cause).split())[:240]}). The model is unchanged. Pass "
            "probe={...} of tokens alone to patch it for text alone."
        ) from error
