"""The main job on the model that ships with the package: convert, uptrain, measure at every stage, save, load again.

The demo is the uptraining recipe itself, in a process of its own with its shipped configuration: what it prints is what
`accelerate launch recipes/uptrain.py --config recipes/configs/grouped_query_tiny.yaml` prints. Recipes lie beside the
package in a clone and inside it in a wheel.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import embedded
from .comparing.store import check_results
from .errors import AttnPatchError, missing_extra

FILES = ("metrics.json", "report.txt", "damage.json", "damage.png", "log.jsonl", "loss.png", "comparison.png", "model")
CONFIG = "configs/grouped_query_tiny.yaml"
INTRODUCTION = """\
The embedded model (8 key-value heads) is converted to 2 key-value heads, uptrained and measured at every stage.
Text: documents that the embedded model was not pretrained on, shipped with the package. Two thirds of them are for
uptraining; the loss is measured on the other third, which nothing here is trained on.
"""


def run(output: Path, *, overrides: Sequence[str] = ()) -> None:
    """Run the demo; it prints one table and the paths of its figures.

    Args:
        output: folder for the metrics, the figures and the uptrained checkpoint; files of an earlier demo are replaced.
        overrides: `section.key=value` changes of the recipe's configuration.

    Raises:
        MissingExtra: a package that the recipes need is not installed.
        AttnPatchError: the embedded model or the recipes are not in this installation, files that are no demo's are in
            the way, or the recipe failed.
    """
    folder = recipes()
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "recipes", "the demo")
    if not (embedded.path() / "config.json").is_file():
        raise AttnPatchError(f"{embedded.path()}: the embedded model is not in this installation; reinstall.")
    if not (output / "cache").is_dir():  # which every demo makes first
        check_results(output, FILES, "metrics.json", {"job", "scores"})
    print(INTRODUCTION, flush=True)
    cache = output / "cache"
    values = [f"train.output={output}", "train.save_every=0", f"data.cache={cache}", f"heldout.cache={cache}"]
    command = [sys.executable, str(folder / "uptrain.py"), "--config", str(folder / CONFIG)]
    for value in (*values, *overrides):
        command += ["--set", value]
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}  # where cores are shared, spinning threads only wait
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise AttnPatchError(f"the demo's recipe ended with exit code {code}; what it said is above.")


def recipes() -> Path:
    """Return the folder of the recipes: of the clone, or what a wheel carries."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "recipes", here / "shipped" / "recipes"):
        if (folder / "uptrain.py").is_file() and (folder / CONFIG).is_file():
            return folder
    raise AttnPatchError(f"{here}: the recipes are not in this installation; reinstall hf_attnpatch.")
