"""What happened, as data; ``str()`` is a table and ``revert()`` takes it back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from .anatomy import Anatomy
from .edits import Write, lost, undo_all
from .errors import PatchConflict
from .exclusive import alone
from .interruption import complete
from .patch import off_default
from .plan import Plan, Step
from .rewriting.tokenizer import lengthened
from .showing import Shown, rendered

if TYPE_CHECKING:
    from .heads.damage import DamageReport


@dataclass
class Report(Shown):
    """The outcome of ``apply``; ``str()`` is a table.

    Attributes:
        plan: what was done, with the state before and after of each edit.
        checks: name -> what the self-check found.
        record: what the model's config now says, as data.
        findings: patch name -> what it measured before it wrote, such as the damage of sharing heads.
    """

    plan: Plan
    checks: Mapping[str, str]
    record: Mapping[str, Any] | None
    findings: Mapping[str, Any] = field(default_factory=dict)
    _writes: list[Write] = field(default_factory=list, repr=False)
    _lock: Any = field(default=None, repr=False)  # of the model
    _reverting: bool = field(default=False, repr=False)

    @property
    def changed(self) -> bool:
        """Whether anything was written."""
        return bool(self.plan.edits)

    @property
    def damage(self) -> DamageReport | None:
        """What sharing key-value heads costs, layer by layer; None where nothing was measured."""
        found: DamageReport | None = self.findings.get("grouped_query")
        return found

    @property
    def stock(self) -> bool:
        """Whether transformers alone loads what ``save_pretrained`` now writes."""
        return self.plan.stock

    @property
    def context(self) -> tuple[int, int] | None:
        """The context that the model declared, in tokens, and the longer one now; None where it is what it was."""
        return self.plan.context

    def lengthen(self, tokenizer: Any) -> str | None:
        """Raise the length at which a tokenizer truncates, where it had the model's old one.

        Args:
            tokenizer: of the model; changed in place.

        Returns:
            A sentence on what was changed; None where nothing was.
        """
        return None if self.context is None else lengthened(tokenizer, *self.context)

    def revert(self) -> None:
        """Put back every object that was there before, bitwise; a second call does nothing.

        If it is interrupted, everything is put back nevertheless; if that fails twice, another call goes on.

        Raises:
            PatchConflict: something was written over a place of this patch since; nothing is reverted.
        """
        if not self._writes:
            return
        with alone(self._lock):
            changed = lost(self._writes)
            if changed and not self._reverting:
                raise PatchConflict(
                    f"{changed[0]} was changed after this patch ({len(changed)} such places); revert the later patch "
                    "first."
                )
            self._reverting = True
            complete(self._put_back)

    def _put_back(self) -> None:
        undo_all(self._writes)
        self._writes.clear()  # forgotten only now that all is back
        self._reverting = False

    def to_dict(self) -> dict[str, Any]:
        """Return what was done and found, as JSON has it."""
        damage = None if self.damage is None else self.damage.to_dict()
        return {**self.plan.to_dict(), "checks": dict(self.checks), "damage": damage}

    def _in_short(self) -> str:
        damage = "" if self.damage is None else f", damage of {len(self.damage.layers)} layers measured"
        return f"{self.plan._in_short()}{damage}{', reverted' if self.changed and not self._writes else ''}"

    def _figures(self) -> Iterable[bytes]:
        return () if self.damage is None else self.damage._figures()

    def __str__(self) -> str:
        checks = Table("self-check", "found", title_justify="left")
        for name, found in self.checks.items():
            checks.add_row(name, found)
        parts = [*_steps(self.plan), *(part for found in self.findings.values() for part in _findings(found))]
        return rendered(*parts, checks) if self.checks else rendered(*parts)


def render_plan(plan: Plan) -> str:
    """Return a plan as tables, one for each patch."""
    return rendered(*_steps(plan))


def render_damage(damage: DamageReport) -> str:
    """Return a damage report as a table, a row for each attention module."""
    return rendered(*_findings(damage))


def _findings(found: object) -> Iterable[RenderableType]:
    from .heads.damage import DamageReport

    if not isinstance(found, DamageReport):
        return
    table = Table("damage", "groups", "energy kept: keys, values", *(f"{stage}: error, KL" for stage in found.stages))
    for layer in found.layers:
        groups = "adjacent" if layer.adjacent else " ".join("+".join(map(str, g)) for g in layer.groups)
        gaps = (layer.gaps[stage] for stage in found.stages)
        cells = [f"{g.output:.4f}  {'-' if g.attention is None else f'{g.attention:.4f}'}" for g in gaps]
        table.add_row(layer.path, groups, f"{layer.key_energy:.3f}  {layer.value_energy:.3f}", *cells)
    yield table
    if found.stages:
        yield "  error: squared, of the attention output, over its variance; KL: of the attention weights, in nats"
    yield from (f"  {note}" for note in found.notes)


def render_anatomy(anatomy: Anatomy) -> str:
    """Return an anatomy as a table, equal places on one line."""
    head = (
        f"{anatomy.architecture} ({anatomy.model_type}): positions {anatomy.positions}, "
        f"context {anatomy.max_positions or 'not declared'}"
    )
    table = Table("where", "what", "layout", "heads", "kv heads", "head dim", "registry")
    rows = []
    for s in anatomy.sites:
        kind = s.kind + (" (cross)" if s.cross else "")
        shape = [str(n) for n in (s.num_heads, s.num_kv_heads, s.head_dim)]
        rows.append((s.path, (kind, s.layout.name, *shape, "yes" if s.dispatches else "no")))
    rows += [(r.path, (r.kind, f"rope: {r.rope_type}", "", "", "", "")) for r in anatomy.rotary]
    rows += [(p, ("position table", f"{n} rows", "", "", "", "")) for p, n in anatomy.tables.items()]
    rows += [(p, ("left alone", why, "", "", "", "")) for p, why in anatomy.other.items()]
    rows += [(p, ("not read", why, "", "", "", "")) for p, why in anatomy.unread.items()]
    for where, what in _folded(rows):
        table.add_row(where, *what)
    return rendered(head, table)


def _steps(plan: Plan) -> Iterable[RenderableType]:
    for step in plan.steps:
        yield title(step)
        if step.proposal.edits:
            yield _step_table(step)
        yield from (f"  {note}" for note in step.proposal.notes)
    if plan.context is not None:
        before, after = plan.context
        yield f"context: {before} -> {after} tokens; report.lengthen(tokenizer) raises a tokenizer that truncates there"
    yield f"stock transformers loads the checkpoint: {'yes' if plan.stock else 'no, it needs hf_attnpatch'}"


def title(step: Step) -> str:
    """Return the patch as it would be written, fields at their default left out."""
    chosen = off_default(step.patch.to_record())
    return f"{step.patch.name}({', '.join(f'{k}={v}' for k, v in chosen.items())})"


def _step_table(step: Step) -> Table:
    table = Table("where", "rung", "before", "after")
    rows = [(edit.claim, (edit.rung, *texts)) for edit, texts in zip(step.proposal.edits, step.previews, strict=True)]
    for where, what in _folded(rows):
        table.add_row(where, *what)
    return table


def _folded(rows: Sequence[tuple[str, tuple[str, ...]]]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Join places that differ in a layer number only and say the same."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, what in rows:
        groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", path), what), []).append(path)
    for (pattern, what), paths in groups.items():
        yield (paths[0] if len(paths) == 1 else f"{pattern}  x{len(paths)}"), what
