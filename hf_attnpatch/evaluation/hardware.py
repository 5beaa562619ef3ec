"""The machine: this one, measured; a row of the table; or a file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import AttnPatchError, EvaluationError
from ..progress import track
from ..schema import brief, from_json, from_yaml, quoted, text_of
from ..writing import write
from .benchmarks import fresh, measured, references
from .listener import Pass
from .machine import BANDWIDTH, Machine, Point
from .roofline import cost, unmeasured
from .table import TABLE

_NUMBERS = ("threads", "memory_bytes", "call_seconds", "operation_seconds", "fresh_bytes", "fresh_seconds")
_MOST = 1e24  # operations, bytes or seconds: no machine has so many
_RATES = ("matmul", "attention", BANDWIDTH)


def machine_for(hardware: str, passes: Sequence[Pass], device: torch.device, *, again: bool = False) -> Machine:
    """Return a machine with the rates that some passes need.

    Args:
        hardware: ``auto`` measures this one, a name of :data:`.table.TABLE` its row, else it is a YAML or JSON file.
        passes: what it is to be asked about.
        device: what ``auto`` measures.
        again: whether ``auto`` measures what an earlier call has measured already.

    Raises:
        EvaluationError: no such row or file, or one that does not read as a machine.
    """
    if hardware == "auto":
        return _this(passes, device, again)
    if hardware in TABLE:
        return from_mapping(TABLE[hardware], f"hardware {hardware}")
    path = Path(hardware)
    if not path.is_file():
        raise EvaluationError(
            f"hardware {hardware!r}: neither a file nor in the table; choose auto, {', '.join(TABLE)} or a YAML file."
        )
    try:
        text = text_of(path)
        # YAML reads numbers as JSON writes them, 1e-06, as text
        found = (from_json if text.lstrip().startswith("{") else from_yaml)(text, f"hardware {path}")
    except AttnPatchError as error:
        raise EvaluationError(f"{str(error).rstrip('.')}; write it as YAML or JSON.") from error
    return from_mapping(found, f"hardware {path}")


def from_mapping(found: Any, where: str) -> Machine:
    """Build a machine from plain data.

    ``name`` and ``rates`` must be there: dtype -> ``matmul`` and ``attention`` in operations per second, ``bandwidth``
    in bytes per second. ``source``, ``threads``, ``memory_bytes``, ``call_seconds``, ``operation_seconds``,
    ``fresh_bytes``, ``fresh_seconds`` may be. A file that ``auto`` wrote has ``points`` in the place of ``rates``.

    Raises:
        EvaluationError: a field is missing, unknown or no number above 0.
    """
    if not isinstance(found, Mapping):
        raise EvaluationError(f"{where}: found a {type(found).__name__}; wanted a mapping with name and rates.")
    if "points" in found:
        return _as_written(found, where)
    unknown = sorted(brief(key, 40) for key in set(found) - {"name", "source", "rates", *_NUMBERS})
    if unknown or not isinstance(found.get("name"), str) or not isinstance(found.get("rates"), Mapping):
        problem = f"no field {unknown[0]!r}" if unknown else "a name (text) and rates (a mapping) must be there"
        raise EvaluationError(f"{where}: {problem}; fields are name, source, rates, {', '.join(_NUMBERS)}.")
    numbers = {name: _number(found.get(name, 0), f"{where}: {name}", least=0) for name in _NUMBERS}
    points = tuple(p for dtype, rates in found["rates"].items() for p in _points(str(dtype), rates, where))
    return Machine(
        name=found["name"],
        source=str(found.get("source", where)),
        threads=int(numbers["threads"]),
        memory_bytes=int(numbers["memory_bytes"]),
        call_seconds=numbers["call_seconds"],
        operation_seconds=numbers["operation_seconds"],
        fresh_bytes=int(numbers["fresh_bytes"]),
        fresh_seconds=numbers["fresh_seconds"],
        points=points,
    )


def _as_written(found: Any, where: str) -> Machine:
    """Return a machine from what ``auto`` wrote.

    Raises:
        EvaluationError: it is damaged, or of another version.
    """
    try:
        machine = Machine.from_dict(found)
    except AttnPatchError as error:
        raise EvaluationError(f"{where}: not a table of rates ({error}); delete it, and measure again.") from error
    numbers = {name: getattr(machine, name) for name in _NUMBERS}
    for name, value in numbers.items():
        _number(value, f"{where}: {name}", least=0)
    for point in machine.points:
        _number(point.rate, f"{where}: the rate of {brief(point.kind, 40)}")
        for name, size in point.size:
            _number(size, f"{where}: {brief(name, 40)} of {brief(point.kind, 40)}", least=0)
    return machine


def _points(dtype: str, rates: Any, where: str) -> list[Point]:
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise EvaluationError(
            f"{where}: rates for {quoted(dtype)}, which is no dtype; write float32, bfloat16 or float16."
        )
    missing = [name for name in _RATES if name not in rates] if isinstance(rates, Mapping) else list(_RATES)
    if missing:
        raise EvaluationError(f"{where}: rates.{dtype} lacks {', '.join(missing)}; wanted: {', '.join(_RATES)}.")
    return [Point(name, dtype, (), _number(rates[name], f"{where}: rates.{dtype}.{name}")) for name in rates]


def _number(value: Any, where: str, least: float | None = None) -> float:
    try:
        number = float(value)  # YAML reads 1e12 as text
    except (OverflowError, TypeError, ValueError):
        number = float("nan")
    if isinstance(value, bool) or not (0 < number < _MOST if least is None else least <= number < _MOST):
        raise EvaluationError(
            f"{where} is {quoted(value)}; wanted a number {'above 0' if least is None else 'of 0 or more'}."
        )
    return number


# -- this machine -----------------------------------------------------------------------------------------------------


def measured_here(passes: Sequence[Pass], device: torch.device, known: Machine | None = None) -> Machine:
    """Measure the rates that some passes need.

    Args:
        passes: what is to be costed.
        device: what is measured, with as many threads as torch now uses.
        known: what was measured before; None begins anew.
    """
    machine = _bare(device) if known is None else known
    return _extended(machine, passes, device)


def _extended(machine: Machine, passes: Sequence[Pass], device: torch.device) -> Machine:
    wanted = unmeasured(machine, passes)
    return machine.extended(measured(*point, device) for point in track(wanted, "measuring this machine"))


def _this(passes: Sequence[Pass], device: torch.device, again: bool) -> Machine:
    file = _file(device)
    known = None if again or not file.is_file() else _kept(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # before minutes of measuring, not after them
    except OSError as error:
        raise EvaluationError(
            f"hardware auto: what is measured is kept in {file.parent}, which cannot be made ({error}); let "
            "XDG_CACHE_HOME name a folder that can be written."
        ) from error
    machine = measured_here(passes, device, known)
    if machine != known:
        write(file, json.dumps(machine.to_dict(), indent=1))
    return machine


def _kept(file: Path) -> Machine:
    try:
        found = from_json(text_of(file), str(file))
    except AttnPatchError as error:
        raise EvaluationError(f"{str(error).rstrip('.')}; delete it, and measure again.") from error
    return _as_written(found, str(file))


def _bare(device: torch.device) -> Machine:
    """Measure what belongs to no kernel: fresh pages, and the overhead of operations in reference models."""
    fresh_bytes, fresh_seconds = fresh(device)
    machine = Machine(
        name=processor(device),
        source=f"measured here with torch {torch.__version__}",
        threads=torch.get_num_threads(),
        memory_bytes=_capacity(device),
        call_seconds=0.0,
        operation_seconds=0.0,
        fresh_bytes=fresh_bytes,
        fresh_seconds=fresh_seconds,
        points=(),
    )
    few, many = references(device)
    machine = _extended(machine, [few.step, many.step], device)
    beside = [each.seconds - cost(machine, each.step).seconds for each in (few, many)]
    counts = [len(each.step.operations) for each in (few, many)]
    each = max((beside[1] - beside[0]) / (counts[1] - counts[0]), 0.0)
    return replace(machine, call_seconds=max(beside[0] - counts[0] * each, 0.0), operation_seconds=each)


def processor(device: torch.device) -> str:
    """Return the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _capacity(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _file(device: torch.device) -> Path:
    """Return where this machine's rates are stored: one file per processor, torch release and thread count."""
    key = f"{processor(device)}|{torch.__version__}|{torch.get_num_threads()}|{device.type}|{platform.node()}"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hf_attnpatch" / "machines" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
