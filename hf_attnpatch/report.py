"""The result of ``apply`` as data; printing it gives a table, and ``revert()`` undoes the patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .edits import Write, lost, undo_all
from .errors import PatchConflict
from .exclusive import alone
from .interruption import complete
from .plan import Plan
from .rewriting.tokenizer import lengthened
from .showing import Shown, rendered
from .tables import steps_of

if TYPE_CHECKING:
    from .heads.damage import DamageReport


_DAMAGING = ("grouped_query", "latent")  # patches whose finding is their damage, in the order they can be applied


@dataclass
class Report(Shown):
    """The outcome of ``apply``; ``str()`` is a table.

    Attributes:
        plan: the edits, with the state before and after each.
        checks: name -> result of the self-check.
        record: the record in the model's config.
        findings: patch name -> measurements made before writing, such as the damage of sharing heads.
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
        """What sharing or compressing key-value heads costs, layer by layer; None where nothing was measured."""
        found: list[DamageReport] = [self.findings[name] for name in _DAMAGING if name in self.findings]
        return found[-1] if found else None

    @property
    def stock(self) -> bool:
        """Whether transformers alone loads what ``save_pretrained`` writes now."""
        return self.plan.stock

    @property
    def context(self) -> tuple[int, int] | None:
        """The declared context in tokens, before and after; None if it did not change."""
        return self.plan.context

    def lengthen(self, tokenizer: Any) -> str | None:
        """Raise the length at which a tokenizer truncates, if it equals the model's old context.

        Args:
            tokenizer: of the model; changed in place.

        Returns:
            A sentence on the change; None if there was none.
        """
        return None if self.context is None else lengthened(tokenizer, *self.context)

    def revert(self) -> None:
        """Restore every previous object, bitwise; a second call does nothing.

        If it is interrupted, everything is restored anyway; if that fails twice, another call continues.

        Raises:
            PatchConflict: something was written over this patch since; nothing is reverted.
        """
        if not self._writes:
            return
        with alone(self._lock):
            changed = lost(self._writes)
            if changed and not self._reverting:
                raise PatchConflict(
                    f"{changed[0]} was changed after this patch ({len(changed)} such places); revert the later patch "
                    "first, or take off what was put on since (an adapter, say)."
                )
            self._reverting = True
            complete(self._put_back)

    def _put_back(self) -> None:
        undo_all(self._writes)
        self._writes.clear()  # only once everything is restored
        self._reverting = False

    def to_dict(self) -> dict[str, Any]:
        """Return the edits and results as JSON."""
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
        shown = (each for each in self.findings.values() if isinstance(each, Shown))
        parts = [*steps_of(self.plan), *(part for each in shown for part in each._tables())]
        return rendered(*parts, checks) if self.checks else rendered(*parts)
