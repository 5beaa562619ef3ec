"""``verify``: checks the invariants of a correct model on the user's own model, and leaves it unchanged."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .anatomy import describe
from .errors import AttnPatchError, UnsupportedArchitecture
from .exclusive import alone, lock_of
from .interruption import all_or_nothing, ensured
from .invariants import INVARIANTS, SAVING, WAYS, Answer, Subject
from .probe import checked_inputs, codebooks, input_device, random_states, reads_tokens, way_back
from .showing import Shown, rendered
from .upstream import words
from .upstream.roles import columns, roles_of

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"

_LENGTH = 24  # tokens in a row of the default probe


@dataclass(frozen=True)
class Finding:
    """The result for one invariant.

    Attributes:
        invariant: a key of ``INVARIANTS`` or ``WAYS``.
        outcome: ``pass``, ``fail`` or ``not applicable``.
        measured: the measurement, or None.
        tolerance: the largest value that passes.
        note: what the measurement is; why the invariant does not apply; or the error if the model did not run.
    """

    invariant: str
    outcome: str
    measured: float | None
    tolerance: float | None
    note: str


@dataclass(frozen=True)
class Verification(Shown):
    """The findings of :func:`verify`; printing it is a table.

    Attributes:
        architecture: class name of the model.
        findings: one for each invariant.
    """

    architecture: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no invariant failed."""
        return all(finding.outcome != FAIL for finding in self.findings)

    def __getitem__(self, invariant: str) -> Finding:
        return next(finding for finding in self.findings if finding.invariant == invariant)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"passed": self.passed, **dataclasses.asdict(self)}

    def _in_short(self) -> str:
        failed = [f.invariant for f in self.findings if f.outcome == FAIL]
        return f"{self.architecture}, {len(self.findings)} invariants, failed: {', '.join(failed) or 'none'}"

    def __str__(self) -> str:
        table = Table("invariant", "outcome", "measured", "allowed", "note", title_justify="left")
        for f in self.findings:
            table.add_row(f.invariant, f.outcome, _figure(f.measured), _figure(f.tolerance), f.note)
        failed = [f.invariant for f in self.findings if f.outcome == FAIL]
        verdict = f"{len(failed)} failed: {'; '.join(failed)}" if failed else "nothing failed"
        return rendered(f"{self.architecture}: {verdict}", table)


def verify(
    model: PreTrainedModel, *, inputs: Mapping[str, Tensor] | None = None, save: bool = True, ways: bool = True
) -> Verification:
    """Run a model on a few tokens and check, invariant by invariant, that it behaves as a correct model does.

    The model is restored bitwise: modes, gradients, config, random state, attention implementation, and what its
    modules keep between forwards. A model that transformers itself computes inconsistently (dynamic rope with a cache,
    for example) fails unpatched as well.

    Args:
        model: a transformers model, weights in memory.
        inputs: of the forward, without padding or mask; by default two rows of 24 tokens. Pass rows longer than the
            original context to test a rope scaling that switches by length.
        save: whether to save and load it twice in a temporary directory.
        ways: whether to run it as ``generate`` and its callers do: a static cache with chunked prefill, assisted
            decoding, beams, a learned prefix in the cache; and with images, sound and positions with several axes, if
            it takes any.

    Raises:
        UnsupportedArchitecture: not a ``PreTrainedModel``, or one that reads no tokens.
        AttnPatchError: inputs that are not a mapping of tensors, have no token ids, fewer than two rows of eight
            tokens, or padding.
    """
    anatomy = describe(model)
    given = _default_inputs(model) if inputs is None else _checked(model, checked_inputs("inputs", inputs))
    subject = Subject(model, anatomy, {name: tensor.to(input_device(model)) for name, tensor in given.items()})
    every = {**INVARIANTS, **(WAYS if ways else {})}
    asked = {name: ask for name, ask in every.items() if save or name not in SAVING}

    def found() -> tuple[Finding, ...]:
        return tuple(find(name, ask, subject) for name, ask in asked.items())

    with alone(lock_of(model)):
        return Verification(anatomy.architecture, all_or_nothing(found, _way_back(model)))


def find(name: str, ask: Callable[[Subject], Answer], subject: Subject) -> Finding:
    """Check one invariant, and restore the model."""
    with untouched(subject.model), torch.no_grad():
        subject.model.eval()
        try:
            answer = ask(subject)
        except (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError) as error:
            return _failed(name, error)
        except (RuntimeError, TypeError, ValueError) as error:
            return _failed(name, error)
    if isinstance(answer, str):
        return Finding(name, NOT_APPLICABLE, None, None, answer)
    outcome = PASS if answer.figure <= answer.tolerance else FAIL  # nan fails
    return Finding(name, outcome, answer.figure, answer.tolerance, answer.what)


@contextlib.contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Restore, at the end, what forwards, backwards and saving change, except weights."""
    with alone(lock_of(model)), ensured(_way_back(model)):
        yield


def _way_back(model: PreTrainedModel) -> Callable[[], None]:
    """Return the function for that: :func:`way_back`, buffers, gradients and the random state.

    Some invariants draw random numbers, seeded and in training mode. A thread that draws meanwhile gets numbers of that
    seed, and may get some of its own again.
    """
    structure, states = way_back(model), random_states(model)
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]

    def put_back() -> None:
        structure()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, content in buffers:
            buffer.detach().copy_(content)
        states()

    return put_back


def _failed(name: str, error: Exception) -> Finding:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return Finding(name, FAIL, None, None, text[:200])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _checked(model: PreTrainedModel, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    roles, inputs = roles_of(model), columns(model, given)
    ids = inputs.get(roles.name(words.TOKENS))
    if ids is None or ids.dim() != 2 or ids.shape[0] < 2 or ids.shape[1] < 8:
        found = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
        raise AttnPatchError(f"inputs: {found}; verify needs input_ids, at least 2 rows of 8 tokens.")
    masks = {roles.names.get(words.MASK), words.DECODER_MASK}
    padding = [name for name, value in inputs.items() if name in masks and not value.all()]
    if padding:
        raise AttnPatchError(f"inputs[{padding[0]!r}] masks something; verify pads by itself, give it rows without.")
    return {name: value for name, value in inputs.items() if name not in masks}


def _default_inputs(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Return two different rows of ordinary tokens, without ids that have a special meaning in the config."""
    if not reads_tokens(model):
        raise UnsupportedArchitecture(
            f"{type(model).__name__}: reads {model.main_input_name}; verify asks with tokens."
        )
    text = model.config.get_text_config(decoder=True)
    special = {i for config in (model.config, text) for i in _special(config)}
    ordinary = [i for i in range(min(text.vocab_size, 8 * _LENGTH)) if i not in special]
    picks = torch.arange(2 * _LENGTH).view(2, _LENGTH) * 7 + 3
    ids = torch.tensor(ordinary)[picks % len(ordinary)].repeat_interleave(codebooks(model), dim=0)
    given = {words.TOKENS: ids}
    if model.config.is_encoder_decoder:
        given[words.DECODER_TOKENS] = ids.flip(0)
    return roles_of(model).call(**given)


def _special(config: PretrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            yield from (i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int))


__all__ = ["FAIL", "NOT_APPLICABLE", "PASS", "Finding", "Verification", "verify"]
