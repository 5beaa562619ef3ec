"""Training state on disk: a folder appears whole under its name or not at all, and restores bit for bit.

Accelerate writes the model, the optimizer and each process's random states (python, numpy, torch) into a temporary
folder; its files are flushed to the disk and then it is renamed. A process killed at any point leaves the last complete
checkpoint, and at most a folder whose name starts with a dot, which the next run removes. There is no scheduler state
and no sampler state: learning rate and data order are functions of the step (see `loop`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator


class ResumeError(ValueError):
    """A run cannot continue from the contents of its folder; the message says why and what to do."""


@dataclass
class Progress:
    """The progress of a run: what a resumed run needs besides tensors and random states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0  # sum of losses since the last log line
    window_tokens: int = 0

    def after(self, value: float, tokens: int, seconds: float) -> Progress:
        """The counters after one more step: its sum of losses, its tokens, its duration."""
        return Progress(
            step=self.step + 1,
            tokens=self.tokens + tokens,
            seconds=self.seconds + seconds,
            window_loss=self.window_loss + value,
            window_tokens=self.window_tokens + tokens,
        )


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = folder.glob("step_*") if folder.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"step_\d{8}", path.name))


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Removes a checkpoint; a kill in between never leaves a partial one under its name."""
    hidden = path.with_name(f".old-{path.name}")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        shutil.rmtree(path)


def save(accelerator: Accelerator, folder: Path, progress: Progress, settings: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint on an optimizer-step boundary; every process calls it.

    Args:
        accelerator: holds the prepared model and optimizer.
        folder: where checkpoints are.
        progress: counters of the run.
        settings: what must be equal for the run to be resumed, JSON-able.
        keep: how many checkpoints stay, the newest.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".tmp-{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        state = {"progress": asdict(progress), "settings": settings, "processes": accelerator.num_processes}
        (temporary / "progress.json").write_text(json.dumps(state, indent=1) + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final.exists():
            discard(final)
        os.replace(temporary, final)
        sync(folder)
        for old in complete(folder)[:-keep]:
            discard(old)
    accelerator.wait_for_everyone()
    return final


def restore(accelerator: Accelerator, folder: Path, settings: dict[str, Any]) -> Progress:
    """Loads the newest checkpoint into the prepared model and optimizer and sets the random states.

    Args:
        accelerator: holds the prepared model and optimizer; a patched model is patched before this.
        folder: where checkpoints are.
        settings: compared with those of the run that wrote it.

    Returns:
        The counters of the run.

    Raises:
        ResumeError: there is no checkpoint, or it was written with other settings or another number of processes.
    """
    found = complete(folder)
    if not found:
        raise ResumeError(f"{folder}: nothing to resume, no complete checkpoint; start without --resume.")
    state = json.loads((found[-1] / "progress.json").read_text())
    if state["processes"] != accelerator.num_processes:
        raise ResumeError(
            f"{found[-1]}: written by {state['processes']} processes, this run has {accelerator.num_processes}; "
            "random states belong to processes, so resume with the same number."
        )
    changed = [key for key, value in settings.items() if state["settings"].get(key) != value]
    if changed:
        before = ", ".join(f"{key} {state['settings'].get(key)} -> {settings[key]}" for key in changed)
        raise ResumeError(f"{found[-1]}: the settings changed ({before}); restore them or choose another train.output.")
    accelerator.load_state(str(found[-1]))
    return Progress(**state["progress"])
