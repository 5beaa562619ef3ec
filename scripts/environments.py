"""Others' software in environments of its own: made once by pip, asked through a worker in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parent / "downstream_workers"
TORCH = "torch==2.13.0"  # first and alone: left to itself, pip may choose a CUDA build of several GB
LIMIT = 3600  # seconds for one run; on an idle core every one here took less than two minutes


@dataclass(frozen=True)
class Runtime:
    """What is run: its worker, and the pip commands that make its environment (none: this process's Python)."""

    name: str
    worker: str
    steps: tuple[tuple[str, ...], ...] = ()
    workers: Path = WORKERS


class InstallFailed(RuntimeError):
    """An environment could not be made."""


class RuntimeFailed(RuntimeError):
    """A runtime that was there did not do what it was asked."""


def python_of(runtime: Runtime, environments: Path) -> Path:
    """The interpreter of a runtime's environment."""
    return environments / runtime.name / "bin" / "python" if runtime.steps else Path(sys.executable)


def _stamp(runtime: Runtime) -> str:
    """What an environment was made from; one that was made from something else is made anew."""
    return json.dumps({"python": sys.version.split()[0], "steps": runtime.steps}, indent=1)


def is_installed(runtime: Runtime, environments: Path) -> bool:
    """Whether the environment is there, whole and made by these very steps."""
    stamp = environments / runtime.name / ".installed"
    return not runtime.steps or (stamp.is_file() and stamp.read_text("utf-8") == _stamp(runtime))


def install(runtime: Runtime, environments: Path) -> None:
    """Makes a runtime's environment anew.

    Raises:
        InstallFailed: a step failed; says which, and what it wrote last.
    """
    folder = environments / runtime.name
    if folder.exists() and not {"pyvenv.cfg", "install.log"} & {path.name for path in folder.iterdir()}:
        raise InstallFailed(f"{folder} is there, and no environment; move it away, or choose other --environments.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    pip = [str(python_of(runtime, environments)), "-m", "pip", "--disable-pip-version-check"]
    for command in [[sys.executable, "-m", "venv", str(folder)], *([*pip, *step] for step in runtime.steps)]:
        with log.open("a") as sink:
            done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT)
        if done.returncode:
            raise InstallFailed(
                f"{runtime.name} could not be installed: `{' '.join(command)}` exited with {done.returncode}; wanted: "
                f"its packages in {folder}.\n{last_lines(log)}"
            )
    (folder / ".installed").write_text(_stamp(runtime), "utf-8")


def run(runtime: Runtime, environments: Path, request: dict[str, Any], log: Path) -> dict[str, Any]:
    """Has a runtime's worker answer a request, in its own environment and process.

    Args:
        runtime: one whose environment is there.
        environments: the folder of environments.
        request: JSON, as the worker wants it; its `scratch` is a folder that is there.
        log: where everything that the worker says goes.

    Returns:
        The answer, with its `seconds`.

    Raises:
        RuntimeFailed: if the worker exits with an error, or is not done in `LIMIT` seconds.
    """
    scratch = Path(request["scratch"])
    asked, answered = scratch / "request.json", scratch / "answer.json"
    asked.write_text(json.dumps(request), "utf-8")
    answered.unlink(missing_ok=True)
    command = [str(python_of(runtime, environments)), str(runtime.workers / runtime.worker), str(asked), str(answered)]
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    settings = {"OMP_NUM_THREADS": str(request["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**{k: v for k, v in os.environ.items() if k not in dropped}, **settings}
    start = time.monotonic()
    with log.open("w") as sink:
        try:
            done = subprocess.run(
                command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=scratch, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            raise RuntimeFailed(f"not done after {LIMIT} s; its log: {log}") from None
    if done.returncode or not answered.is_file():
        raise RuntimeFailed(f"exit status {done.returncode}; its log, {log}, ends with\n{last_lines(log)}")
    found: dict[str, Any] = json.loads(answered.read_text("utf-8"))
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, without progress bars' overwritten lines."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in log.read_text("utf-8", "replace").splitlines()]
    return "\n".join(f"  | {line[:300]}" for line in [line for line in lines if line][-count:])
