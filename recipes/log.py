"""The log of a run: one JSON record a line, the same to the trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

Record = dict[str, float]


class LossError(ValueError):
    """A training has come to a loss that is not finite; the message says what to do."""


def check_loss(sums: list[float]) -> list[float]:
    """Returns the sums of a step, of which the first is the loss, before anything is learned from it.

    Raises:
        LossError: it is not finite.
    """
    if not math.isfinite(sums[0]):
        raise LossError(
            f"the loss of a step is {sums[0]}; this step changed nothing. Look at the last lines of log.jsonl, "
            "lower train.lr, or give train.warmup more steps."
        )
    return sums


class Log:
    """`log.jsonl` and the trackers, written by the main process.

    Args:
        accelerator: knows the main process and holds the trackers.
        folder: where `log.jsonl` is.
        step: lines after this step, which a killed run wrote beyond its checkpoint, are dropped.
        settings: of the run, for the trackers.
        trackers: names of the trackers, for Accelerate.
    """

    def __init__(
        self, accelerator: Accelerator, folder: str, step: int, settings: dict[str, Any], trackers: Sequence[str]
    ) -> None:
        self.accelerator, self.trackers = accelerator, trackers
        self.path = Path(folder) / "log.jsonl"
        text = self.path.read_text() if step and self.path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a run that was stopped may leave half a line at the end
        self.records: list[Record] = [each for each in map(json.loads, lines) if each["step"] <= step]
        if accelerator.is_main_process:
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
            os.replace(temporary, self.path)
        if trackers:
            scalars = {key: value for key, value in settings.items() if isinstance(value, (int, float, str))}
            accelerator.init_trackers("hf_attnpatch", config=scalars)

    def write(self, record: Record) -> None:
        """Appends one record; it has a `step`."""
        self.records.append(record)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if self.trackers:
                values = {key: value for key, value in record.items() if key != "step"}
                self.accelerator.log(values, step=int(record["step"]))

    def close(self) -> None:
        """Lets the trackers finish."""
        if self.trackers:
            self.accelerator.end_training()
