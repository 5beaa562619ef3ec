"""The best of the package on the model that ships with it: diagnosis, conversion, texts, speed, training, one page.

The demo is a recipe, ``recipes/demo.py``, in a process of its own with its shipped configuration. All that it and the
libraries say goes to a log; here is one progress display, and at the end the lines that matter. Recipes lie beside the
package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from . import embedded
from .comparing.store import check_results
from .errors import AttnPatchError
from .progress import Stages

FILES = ("metrics.json", "demo.html", "demo.svg", "log.jsonl", "log.txt", "model")
EARLIER = ("report.txt", "damage.json", "damage.png", "loss.png", "comparison.png")  # which demos of 0.1 wrote
CONFIG = "configs/demo.yaml"
_NONE = [("starting", 1.0)]  # for a recipe that ends before it says what it will do


def run(output: Path, *, overrides: Sequence[str] = ()) -> str:
    """Run the demo, with one progress display.

    Args:
        output: folder for the page, its picture, the metrics and the uptrained checkpoint; files of an earlier demo are
            replaced.
        overrides: ``section.key=value`` changes of the recipe's configuration.

    Returns:
        What was found, in a few lines, and the path of the page.

    Raises:
        AttnPatchError: the embedded model or the recipes are not in this installation, files that are no demo's are in
            the way, or the recipe failed.
    """
    folder = recipes()
    if not (embedded.path() / "config.json").is_file():
        raise AttnPatchError(f"{embedded.path()}: the embedded model is not in this installation; reinstall.")
    if not (output / "cache").is_dir():  # which every demo makes first
        check_results(output, (*FILES, *EARLIER), "metrics.json", {"job", "scores"})
    (output / "cache").mkdir(parents=True, exist_ok=True)
    cache = output / "cache"
    values = [f"train.output={output}", *(f"{part}.cache={cache}" for part in ("data", "heldout", "calibration"))]
    command = [sys.executable, "-W", "ignore", str(folder / "demo.py"), "--config", str(folder / CONFIG)]
    for value in (*values, *overrides):
        command += ["--set", value]
    # where cores are shared, spinning threads only wait; files that are there are not asked for on the Hub
    environment = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    log = output / "log.txt"
    with log.open("w", encoding="utf-8") as words:
        found = _watched(command, environment, words)
    if found is None:
        said = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        raise AttnPatchError(f"the demo did not finish: {said[-1] if said else 'no word why'} (all of it: {log})")
    return f"{found}\n\npage: {output / 'demo.html'}\npicture: {output / 'demo.svg'}\nmodel: {output / 'model'}"


def recipes() -> Path:
    """Return the folder of the recipes: of the clone, or what a wheel carries."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "recipes", here / "shipped" / "recipes"):
        if (folder / "demo.py").is_file() and (folder / CONFIG).is_file():
            return folder
    raise AttnPatchError(f"{here}: the recipes are not in this installation; reinstall hf_attnpatch.")


def _watched(command: Sequence[str], environment: dict[str, str], words: IO[str]) -> str | None:
    """Run the recipe and show its stages; return its last words, or None where it failed."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=words, text=True) as worker:
        try:
            told = _told(worker)
            first: dict[str, Any] = next(told, {})
            listed = [(str(said), float(seconds)) for said, seconds in first.get("stages", [])]
            stages = Stages(listed or _NONE)
            done: str | None = None
            with stages:
                for what in told:
                    if "begins" in what:
                        stages.begin(int(what["begins"]))
                    done = what.get("done", done)
        except BaseException:
            worker.terminate()  # a signal, and whatever else ends this: nothing goes on unseen
            raise
    return done if worker.returncode == 0 else None


def _told(worker: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert worker.stdout is not None
    for line in worker.stdout:
        yield json.loads(line)
