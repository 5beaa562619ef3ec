"""What happened, as data; ``str()`` is a table and ``revert()`` takes it back."""

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
        """What sharing or compressing key-value heads costs, layer by layer; None where nothing was measured."""
        found: list[DamageReport] = [self.findings[name] for name in _DAMAGING if name in self.findings]
        return found[-1] if found else None

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
        shown = (each for each in self.findings.values() if isinstance(each, Shown))
        parts = [*steps_of(self.plan), *(part for each in shown for part in each._tables())]
        return rendered(*parts, checks) if self.checks else rendered(*parts)
