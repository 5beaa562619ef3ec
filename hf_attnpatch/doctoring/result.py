"""What the doctor found in an installation, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..showing import Shown
from .environment import Extra, Package
from .kernels import Kernel
from .trial import Trial

SCHEMA = 1


@dataclass(frozen=True)
class DoctorReport(Shown):
    """What works in this installation; ``str()`` says it in a few lines.

    Attributes:
        packages: what is installed, and the releases that were tested.
        machine: operating system, processor and GPU, by kind.
        trials: one for each patch and model, and one for each model as it is.
        kernels: one for each attention kernel and device.
        extras: one for each extra.
        seconds: that it took.
    """

    packages: tuple[Package, ...]
    machine: str
    trials: tuple[Trial, ...]
    kernels: tuple[Kernel, ...]
    extras: tuple[Extra, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether all that should work here does."""
        return not any(self.failures)

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for each thing that should work here and does not."""
        return tuple(self._failures())

    def _in_short(self) -> str:
        return f"{len(self.trials)} trials, {len(self.kernels)} kernels, {len(self.failures)} fail that should not"

    def _failures(self) -> Iterator[str]:
        for t in self.trials:
            if not t.ok:
                yield f"{t.patch} on {t.model} {t.outcome}: {t.note}"
        for k in self.kernels:
            if not k.ok:
                yield f"{k.name} on {k.device} {k.outcome}: {k.note}"
        for e in self.extras:
            if not e.ok:
                yield f"extra {e.name} {e.outcome}: {e.note}"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "machine": self.machine,
            "packages": [_package(p) for p in self.packages],
            "patches": [{**dataclasses.asdict(t), "ok": t.ok} for t in self.trials],
            "kernels": [{**dataclasses.asdict(k), "ok": k.ok} for k in self.kernels],
            "extras": [{**dataclasses.asdict(e), "ok": e.ok} for e in self.extras],
            "failures": list(self.failures),
            "seconds": round(self.seconds, 1),
        }

    def __str__(self) -> str:
        versions = ", ".join(
            f"{p.name} {p.version}" + (f" ({p.standing})" if p.standing not in ("", "tested") else "")
            for p in self.packages
            if p.version is not None
        )
        count = sum(t.outcome == "works" for t in self.trials)
        head = (
            f"{count} of {len(self.trials)} trials of patches work; {len(self.failures)} things that should work do not"
        )
        return "\n".join([versions, head, *(f"  {line}" for line in self.failures)])


def _package(package: Package) -> dict[str, Any]:
    tested = None if package.tested is None else list(package.tested)
    return {"name": package.name, "version": package.version, "tested": tested, "standing": package.standing}
