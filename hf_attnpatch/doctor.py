"""What works in this installation, proved on small models; and who reads which field of a checkpoint's config."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .doctoring.environment import extras, packages
from .doctoring.expected import CASES, Case
from .doctoring.files import read
from .doctoring.kernels import kernels
from .doctoring.legacy import LegacyKeys, write_keys
from .doctoring.models import MODELS, build
from .doctoring.quiet import quiet
from .doctoring.reading import CheckpointReport, readings_of
from .doctoring.result import DoctorReport
from .doctoring.text import clean
from .doctoring.trial import CRASHES, FAILS, NOTHING, Trial, trial, untouched
from .errors import AttnPatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def doctor(
    *, models: Sequence[str] = MODELS, device: str = "cpu", progress: Callable[[str], object] | None = None
) -> DoctorReport:
    """Try every patch on small models, every kernel of this machine and every extra, and say what works.

    A patch works where it applies, passes its self-check, has its effect, reverts to the same bits, and where cached
    decoding (through ``generate`` on a left-padded batch, and by forwards of one's own) gives what forwards without a
    cache give. What it should do on a model stands in a reviewed table; a refusal that stands there is no failure.

    Args:
        models: of ``embedded``, ``llama``, ``mistral``, ``gemma2``, ``gpt2``, ``opt``, ``bloom``.
        device: on which patches are tried; kernels are tried on the CPU, and on a GPU where there is one.
        progress: is told the name of what comes next.

    Raises:
        AttnPatchError: no such model, or no such device here.
    """
    began = time.perf_counter()
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise AttnPatchError(f"models: there is no {unknown[0]!r}; choose from {', '.join(MODELS)}.")
    where, tell = _device(device), progress or (lambda _: None)
    with quiet():
        trials = tuple(t for name in models for t in _trials(name, where, tell))
        tell("kernels")
        kernel = kernels()
        tell("extras")
        extra = extras()
    seconds = time.perf_counter() - began
    return DoctorReport(packages(), _machine(), trials, kernel, extra, seconds)


def doctor_checkpoint(folder: str | os.PathLike[str]) -> CheckpointReport:
    """Say which fields of a checkpoint's config transformers 5, readers written for 4, llama.cpp and vLLM read.

    Experimental: its arguments may get other names or defaults between minor versions.

    The installed transformers is asked: a model is built from the config, without weights, and what reads which field
    is noted. For the others there is a table of reviewed facts, each with its source. No code of the checkpoint runs.

    Args:
        folder: of a checkpoint, with a ``config.json``; other files are looked at where they are.

    Raises:
        AttnPatchError: no such folder, no config, broken JSON or weights, or a family that transformers does not know.
    """
    with quiet():
        return readings_of(read(Path(folder)))


def write_legacy_keys(folder: str | os.PathLike[str]) -> LegacyKeys:
    """Write ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` into a checkpoint's config, for readers of version 4.

    Experimental: its arguments may get other names or defaults between minor versions.

    What else stands there stays, in its order. Nothing is written unless transformers computes the same from it, bit by
    bit; a second time there is nothing to write.

    Args:
        folder: of a checkpoint, with a ``config.json``.

    Raises:
        AttnPatchError: as :func:`doctor_checkpoint`; a key is there with another value; version 4 has no key for these
            angles, or could not load the family anyway.
    """
    with quiet():
        return write_keys(read(Path(folder)))


def _trials(name: str, device: torch.device, tell: Callable[[str], object]) -> Iterator[Trial]:
    """Yield a trial of the model as it is, then one of each patch; a model that cannot be built has the first only."""
    ready: dict[str | None, PreTrainedModel] = {}
    for label, case in {NOTHING: Case({}), **CASES}.items():
        tell(f"{name}: {label}")
        if case.attention not in ready:
            try:
                ready[case.attention] = build(name, device, case.attention)
            except CRASHES as error:
                yield Trial(label, name, FAILS, "works", note=f"{type(error).__name__}: {clean(str(error))}")
                return
        model = ready[case.attention]
        found = untouched(name, model) if label == NOTHING else trial(label, name, model, case)
        if found.outcome == FAILS:  # nothing is known of what state it was left in
            del ready[case.attention]
        yield found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AttnPatchError(f"device {name!r} is not there: {clean(str(error))}") from error
    return device


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{platform.system()} on {platform.machine()}, {gpu}"
