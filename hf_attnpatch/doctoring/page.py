"""Renders the doctor's results as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..showing import visible
from .readers import READERS, READS, REFUSES, SILENT, WARNS
from .reading import CheckpointReport
from .result import DoctorReport
from .trial import FAILS, NOTHING, Trial

_STYLE = {"works": "green", "refuses": "yellow", FAILS: "bold red", "not installed": "dim"}


def console() -> Console:
    """Return the console to print to: as wide as the terminal, or 140 columns without one."""
    return Console(width=None if sys.stdout.isatty() else 140)


def show(report: DoctorReport, console: Console) -> None:
    """Print a report of an installation."""
    for part in (_packages(report), _patches(report.trials), _others(report), *_reasons(report)):
        console.print(part)
    if report.ok:
        console.print(f"all that should work here does ({report.seconds:.0f} s)", style="green")
    else:
        console.print(f"{len(report.failures)} things that should work here do not:", style="bold red")
        for line in report.failures:
            console.print(f"  {line}", markup=False, highlight=False)


def show_checkpoint(report: CheckpointReport, console: Console) -> None:
    """Print who reads which field of a checkpoint."""
    columns = (Column(reader, no_wrap=True) for reader in READERS)
    table = Table(
        "what it says", "", *columns, title=_plain(f"{report.name} ({report.model_type})"), title_justify="left"
    )
    found = {(r.fact, r.reader): r for r in report.readings}
    for fact, value in dict.fromkeys((r.fact, r.value) for r in report.readings):
        verdicts = [found[fact, reader].verdict if (fact, reader) in found else "" for reader in READERS]
        table.add_row(_plain(fact), _plain(value[:40]), *(Text(v, _verdict_style(v)) for v in verdicts))
    console.print(table)
    for r in report.readings:
        if r.verdict in (*SILENT, WARNS, REFUSES) and not r.part_of:
            console.print(_plain(f"  {r.reader} {r.verdict} {r.fact}: {r.says}", _verdict_style(r.verdict)))
    asked = "built and run" if report.ran else "built"
    unread = ", ".join(report.unread) or "none"
    console.print(_plain(f"  fields that change nothing in transformers 5 (a model was {asked} from them): {unread}"))
    for line in report.advice:
        console.print(_plain(f"  {line}", "green"))


def _plain(text: str, style: str = "") -> Text:
    """Escape a text from a checkpoint."""
    return Text(visible(text), style)


def _verdict_style(verdict: str) -> str:
    return (
        _STYLE[FAILS]
        if verdict in SILENT
        else "yellow"
        if verdict in (WARNS, REFUSES)
        else "green"
        if verdict == READS
        else ""
    )


def _packages(report: DoctorReport) -> Table:
    table = Table("package", "installed", "tested", "", title=report.machine, title_justify="left")
    for p in report.packages:
        known = "" if p.tested is None else p.tested[0] if len({*p.tested}) == 1 else " to ".join(p.tested)
        style = "yellow" if "than tested" in p.standing else ""
        table.add_row(p.name, p.version or "-", known, Text(p.standing, style))
    return table


def _patches(trials: Sequence[Trial]) -> Table:
    models = list(dict.fromkeys(t.model for t in trials))
    found = {(t.patch, t.model): t for t in trials}
    said = "cached decoding against forwards without a cache, relative to the largest logit; -: refuses"
    table = Table(Column("patch", no_wrap=True), *models, caption=said, caption_justify="left")
    for patch in dict.fromkeys(t.patch for t in trials):
        cells = [_cell(found.get((patch, model))) for model in models]
        table.add_row("(as it is)" if patch == NOTHING else patch, *cells)
    return table


def _cell(trial: Trial | None) -> Text:
    if trial is None:
        return Text("")
    if not trial.ok:
        return Text(trial.outcome.upper(), _STYLE[FAILS])
    return Text("-" if trial.difference is None else f"{trial.difference:.0e}", _STYLE[trial.outcome])


def _others(report: DoctorReport) -> Table:
    table = Table(Column("kernel or \\[extra]", no_wrap=True), "where", "outcome", "note")
    for k in report.kernels:
        why = k.note.rpartition(f"{k.name}: ")[2].partition(". Choose")[0]
        note = why if k.difference is None else f"{k.difference:.0e} from dense attention in fp32"
        table.add_row(
            k.name, f"{k.device}, {k.dtype}", Text(k.outcome, _STYLE[k.outcome if k.ok else FAILS]), Text(note)
        )
    for e in report.extras:
        table.add_row(Text(f"[{e.name}]"), "", Text(e.outcome, _STYLE[e.outcome]), Text(e.note))
    return table


def _reasons(report: DoctorReport) -> Iterable[RenderableType]:
    """Yield the reasons of refusals, with equal patches and reasons on one line."""
    told: dict[tuple[str, str], list[str]] = {}
    for t in report.trials:
        if t.ok and t.outcome == "refuses":
            told.setdefault((t.patch, _reason(t.note)), []).append(t.model)
    by_reason: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (patch, reason), models in told.items():
        by_reason.setdefault((reason, tuple(models)), []).append(patch)
    if by_reason:
        yield Text("refusals that are expected", "yellow")
    for (reason, on), patches in by_reason.items():
        yield Text(f"  {', '.join(patches)} on {', '.join(on)}: {reason}")


def _reason(note: str) -> str:
    """Return a refusal without the model's class at its beginning and the advice at its end."""
    head, _, rest = note.partition(": ")
    said = rest if head.isidentifier() and rest else note
    return said.partition("; positions here are")[0].partition(" (model.")[0].rstrip(".")
