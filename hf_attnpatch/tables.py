"""Renders plans and anatomies as tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from .patch import off_default
from .showing import rendered

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .plan import Plan, Step


def render_plan(plan: Plan) -> str:
    """Render a plan as tables, one for each patch."""
    return rendered(*steps_of(plan))


def render_anatomy(anatomy: Anatomy) -> str:
    """Render an anatomy as a table, with equal modules on one line."""
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


def steps_of(plan: Plan) -> Iterable[RenderableType]:
    """Yield the tables and lines of a plan."""
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
    """Return the patch as a Python call, without fields at their default."""
    chosen = off_default(step.patch.to_record())
    return f"{step.patch.name}({', '.join(f'{k}={v}' for k, v in chosen.items())})"


def _step_table(step: Step) -> Table:
    table = Table("where", "rung", "before", "after")
    rows = [(edit.claim, (edit.rung, *texts)) for edit, texts in zip(step.proposal.edits, step.previews, strict=True)]
    for where, what in _folded(rows):
        table.add_row(where, *what)
    return table


def _folded(rows: Sequence[tuple[str, tuple[str, ...]]]) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Join modules that differ in the layer index only."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, what in rows:
        groups.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", path), what), []).append(path)
    for (pattern, what), paths in groups.items():
        yield (paths[0] if len(paths) == 1 else f"{pattern}  x{len(paths)}"), what
