"""The result of ``diagnose`` as data; ``str()`` is a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table

from .. import charts
from ..evaluation.listener import PARTS
from ..evaluation.result import Result
from ..evaluation.roofline import Phase
from ..showing import rendered

PHASES = {"prefill": "prefill, whole batch", "decode": "decoding, one token each", "train": "training step"}


@dataclass(frozen=True)
class Memory(Result):
    """Bytes at the peak of a phase, by what holds them."""

    weights: int
    cache: int
    gradients_and_optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.cache + self.gradients_and_optimizer + self.activations


@dataclass(frozen=True)
class Work(Result):
    """The cost of one model, with an entry in ``phases`` and ``memory`` for each of its phases."""

    phases: dict[str, Phase]
    memory: dict[str, Memory]
    cache_bytes: int


@dataclass(frozen=True)
class Lack(Result):
    """Something that the model lacks for the work.

    Attributes:
        kind: ``context``, ``cache``, ``attention`` or ``memory``.
        where: the phase it shows in, or empty.
        what: a sentence with the numbers.
    """

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Setting(Result):
    """One setting of a patch.

    Attributes:
        spec: of the patch, as ``--patch`` takes it.
        gains: what falls by which factor; above 1 is better.
        lost: share of the energy of keys and values that merging by the weights alone is predicted to lose, a bound for
            what methods that are fitted on text lose; None where the weights are not at hand, or cannot be aligned.
        lifts: whether what was lacking is not lacking with it.
    """

    spec: str
    gains: dict[str, float]
    lost: float | None
    lifts: bool


@dataclass(frozen=True)
class Prescription(Result):
    """A patch that answers a lack.

    Attributes:
        answers: the kind of the lack.
        code: a line of Python that applies it to ``model``.
        command: the same on the command line.
        gains: what falls by which factor, such as ``decode seconds``; above 1 is better.
        after: what the patched model would cost.
        untouched: what stays as it was, and what the patch does not promise.
        stock: whether stock transformers loads the result.
        settings: strengths of the patch, the mildest first; empty where it has one only. What is prescribed is the
            mildest that lifts what is lacking, or the mildest of all where none does.
    """

    answers: str
    code: str
    command: str
    gains: dict[str, float]
    after: Work
    untouched: tuple[str, ...]
    stock: bool
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Diagnosis(Result):
    """The diagnosis of a model for some work on some hardware.

    Attributes:
        model: class name.
        hardware: name of the machine.
        source: where its rates are from.
        context: tokens in a sequence.
        batch: sequences.
        dtype: of the weights.
        work: what it costs.
        lacks: what is wrong with it for this work.
        prescriptions: patches that answer.
        declined: lacks that no patch here answers, each with the reason.
        notes: what was left out.
    """

    model: str
    hardware: str
    source: str
    context: int
    batch: int
    dtype: str
    work: Work
    lacks: tuple[Lack, ...]
    prescriptions: tuple[Prescription, ...]
    declined: tuple[str, ...]
    notes: tuple[str, ...]

    def _in_short(self) -> str:
        lacks = ", ".join(dict.fromkeys(lack.kind for lack in self.lacks)) or "nothing"
        work = f"{self.batch} x {self.context} tokens on {self.hardware}"
        return f"{self.model}, {work}, lacks: {lacks}; {len(self.prescriptions)} prescriptions"

    def __str__(self) -> str:
        head = f"{self.model}, {self.dtype}: {self.batch} x {self.context} tokens on {self.hardware} ({self.source})"
        lines: list[RenderableType] = [head, _table(self.work)]
        lines += [f"lacks {lack.kind}: {lack.what}" for lack in self.lacks] or ["lacks nothing that a patch here gives"]
        for each in self.prescriptions:
            lines += ["", *_prescribed(each)]
        lines += [f"no patch here: {reason}" for reason in self.declined]
        lines += [f"note: {note}" for note in self.notes]
        return rendered(*lines)

    def _figures(self) -> Iterable[bytes]:
        name = "decode" if "decode" in self.work.phases else next(iter(self.work.phases), None)
        if name is None:
            return
        rows = [("now", self.work.phases[name], "original")]
        for each in self.prescriptions:
            if name in each.after.phases:
                rows.append((each.command.split("--patch ")[-1], each.after.phases[name], "ours"))
        bars = [charts.Bar(said, phase.seconds, seconds(phase.seconds), colour) for said, phase, colour in rows]
        note = f"predicted, {self.batch} texts of {self.context:,} tokens; less is better"
        yield charts.alone(charts.bars(PHASES[name].capitalize(), bars, note))


def _table(work: Work) -> Table:
    table = Table("phase", "time", *PARTS, "memory", "weights", "cache", "other")
    for name, phase in work.phases.items():
        memory = work.memory[name]
        shares = [f"{phase.parts[part] / phase.seconds:.0%}" for part in PARTS]
        held = (memory.total, memory.weights, memory.cache, memory.gradients_and_optimizer + memory.activations)
        table.add_row(PHASES[name], seconds(phase.seconds), *shares, *map(size, held))
    return table


def _settings(settings: Sequence[Setting]) -> Table:
    names = list(dict.fromkeys(name for each in settings for name in each.gains))
    table = Table("setting", *(f"less {name}" for name in names), "energy lost", "lifts it")
    for each in settings:
        gains = [f"{each.gains[name]:.2f} x" if name in each.gains else "-" for name in names]
        lost = "not predicted" if each.lost is None else f"{each.lost:.1%}"
        table.add_row(each.spec, *gains, lost, "yes" if each.lifts else "no")
    return table


def _prescribed(each: Prescription) -> Iterable[RenderableType]:
    yield f"for {each.answers}: {each.code}"
    yield f"  or: {each.command}"
    gains = ", ".join(f"{what} {factor:.2f} times less" for what, factor in each.gains.items())
    yield f"  predicted: {gains or 'no time or memory; see below'}"
    yield f"  stock transformers loads the result: {'yes' if each.stock else 'no, it needs hf_attnpatch'}"
    if each.settings:
        yield _settings(each.settings)
    yield from (f"  not touched: {line}" for line in each.untouched)


def seconds(value: float) -> str:
    """Format a time."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: float) -> str:
    """Format a number of bytes."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value / factor < 1000 else f"{value / factor:.0f} {unit}"
    return f"{value:.0f} B"


__all__ = ["PHASES", "Diagnosis", "Lack", "Memory", "Prescription", "Setting", "Work"]
